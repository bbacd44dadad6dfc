"""Prepared optimizer of :class:`FloraAccelerator`, with its accumulator."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from floragrad._extras import require
from floragrad.torch.accumulation import GradientAccumulator
from floragrad.torch.accumulation.remedies import Remedies

require("accelerate", "accelerate")

from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402

_WINDOW = "accumulation"
"""Key of the window in the optimizer's state, with which it is saved and loaded."""


class AcceleratedAccumulator(GradientAccumulator):
    """Accumulator of one prepared optimizer; backward passes may be another optimizer's, without gradients for it."""

    remedies = Remedies(
        backward="call accelerator.backward(loss) instead of loss.backward(); accelerator.end_training() gives the "
        "model back",
        step="step the optimizer that accelerator.prepare() returned",
        clip="call accelerator.clip_grad_norm_(model.parameters(), max_norm), or construct the accelerator with "
        "accumulation={'release': False}",
        drop="optimizer.zero_grad() drops the window",
        close="call end_training() or free_memory() of the accelerator that it was prepared with; where that one is "
        "out of reach, floragrad.GradientAccumulator.close_all(model)",
    )
    expects_gradients = False


class AccumulatingOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """Optimizer of :meth:`FloraAccelerator.prepare` with its accumulator.

    Attributes:
        window: Its accumulator; None once the accelerator has detached it.
        accumulator: Its accumulator, closed or not.
        resumes_windows: True if a partial window is resumed; False if the loop goes back to the window's first
            micro-batch.
    """

    window: GradientAccumulator | None = None
    accumulator: GradientAccumulator | None = None
    resumes_windows = True
    _broken = False

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Fold the gradients of a backward pass inside this context; a micro-batch may have several."""
        window = self.window
        if window is None:
            yield
            return
        if window.accepts_late_passes:
            passes = window.late_pass()
        elif window.complete:
            raise RuntimeError(
                "a backward pass after the window's last one: run each micro-batch inside `with "
                "accelerator.accumulate(model):`, and its losses, if there are several, in one backward(a + b); freeze "
                "(requires_grad_(False)) the models that another model's pass goes through"
            )
        else:
            # Accelerate has divided the loss by the number of steps, hence weight 1. With release the window ends
            # when its gradient is first needed; with several processes, when a pass has given it a gradient.
            last = self.gradient_state.sync_gradients and not (window.releases or window.is_shared)
            passes = window.micro_batch(weight=1.0, last=last)
        try:
            with passes:
                yield
        except BaseException:
            self._broken = True
            raise
        if self.gradient_state.sync_gradients and window.is_shared and not window.releases:
            window.flush_if_received()

    def step(self, closure: Any = None) -> None:
        """Update with the window's gradient where Accelerate steps; without a window, as Accelerate does."""
        window = self.window
        if window is None:
            super().step(closure)
            return
        if not self.gradient_state.sync_gradients:
            return
        if closure is not None:
            raise ValueError("step(closure) with accumulation: run backward(loss) before step(), without a closure")
        is_complete = window.flush()
        if is_complete or not self.trained:
            window.check_received()
        if not is_complete:
            return
        stepped = window.step()
        if self.scaler is not None:
            self._is_overflow = not stepped
            self.scaler.update()

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop the window where Accelerate zeroes, or after a failed backward pass."""
        super().zero_grad(set_to_none)
        if self.window is not None and (self.gradient_state.sync_gradients or self._broken):
            self.window.zero_grad()
            self._broken = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer and its window; a bare optimizer can load it too.

        Raises:
            RuntimeError: Several processes are inside a window.
        """
        saved: dict[str, Any] = super().state_dict()
        if self.window is None:
            return saved
        window = self.window.state_dict()
        if window["rank"][1] > 1 and (window["seen"] or window["ended"]):
            if not self.resumes_windows:
                return saved
            raise RuntimeError(
                "saving inside a window of several processes: each has a part of its own, and Accelerate saves the "
                "first one's alone; save after optimizer.step() under `if accelerator.sync_gradients:`"
            )
        return {**saved, _WINDOW: window}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load optimizer and window; a state without a window begins a new one."""
        saved = dict(state_dict)
        window = saved.pop(_WINDOW, None)
        super().load_state_dict(saved)
        if self.window is None:
            return
        if window is not None:
            self.window.load_state_dict(window)
        if window is None or not self.resumes_windows:
            self.window.zero_grad()

    def attach_window(self, window: GradientAccumulator) -> None:
        """Attach an accumulator."""
        self.window = self.accumulator = window

    def detach(self) -> None:
        """Remove the hooks; drop a partial window."""
        if self.window is not None:
            self.window.zero_grad()
            self.window.close()
            self.window = None

    @property
    def trained(self) -> list[Tensor]:
        """Parameters that require gradients."""
        return [param for group in self.param_groups for param in group["params"] if param.requires_grad]
