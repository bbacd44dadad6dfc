"""Ctrl-C and SIGTERM: asked once, a run ends after its step."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


class StopRequest:
    """Whether a signal has asked to stop.

    Attributes:
        signum: The signal; None while there was none.
        forward: Called with the signal when it comes, for whoever does the work.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.forward: Callable[[int], None] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first SIGINT or SIGTERM; a second one does what it does elsewhere."""
        before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

        def note(signum: int, _frame: FrameType | None) -> None:
            self.signum = signum
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.forward is not None:
                self.forward(signum)

        try:
            for signum in before:
                signal.signal(signum, note)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
