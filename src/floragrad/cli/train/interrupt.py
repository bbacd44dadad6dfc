"""Ctrl-C and SIGTERM: asked once, a run ends after its step."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Request of a signal to stop.

    Attributes:
        signum: The signal; None while there was none.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._pending: list[int] = []
        self._forward: Callable[[int], None] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first SIGINT or SIGTERM; a second one acts as elsewhere.

        A signal that came earlier to a process that was started with :func:`blocked` is noted too.
        """
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}

        def note(signum: int, _frame: FrameType | None) -> None:
            self.signum = signum
            for number, handler in before.items():
                signal.signal(number, handler)
            self._pending.append(signum)
            self._deliver()

        try:
            for signum in before:
                signal.signal(signum, note)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def forwarding(self, forward: Callable[[int], None]) -> Iterator[None]:
        """Pass the signal on once, to whoever does the work: when it comes, or now if it has come already."""
        self._forward = forward
        self._deliver()
        try:
            yield
        finally:
            self._forward = None

    def _deliver(self) -> None:
        """Forward a pending signal. The handler may interrupt this anywhere, but only one of the two can pop it."""
        forward = self._forward
        if forward is None:
            return
        try:
            signum = self._pending.pop()
        except IndexError:
            return
        forward(signum)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Start processes that keep SIGINT and SIGTERM waiting until they listen, so that none ends them halfway."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
