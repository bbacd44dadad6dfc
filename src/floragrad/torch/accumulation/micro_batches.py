"""Micro-batches of a window: their begin and end, and the fold of their gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.amp import GradScaler

from floragrad.torch.accumulation.entries import ParamEntries
from floragrad.torch.accumulation.grad_checks import FoldedGradCheck
from floragrad.torch.accumulation.remedies import Remedies
from floragrad.torch.accumulation.settings import Settings
from floragrad.torch.accumulation.steppers import Stepper, late_gradient_error
from floragrad.torch.accumulation.window import ParamEntry, Window, no_grad_no_autocast
from floragrad.torch.dynamo import disable_dynamo

if TYPE_CHECKING:
    from floragrad.torch.accumulation.deferred import DeferredReduction


class MicroBatches:
    """Base class of :class:`GradientAccumulator`: a window until it is complete."""

    remedies = Remedies()

    _settings: Settings
    _entries: ParamEntries
    _window: Window
    _folded_grads: FoldedGradCheck
    _stepper: Stepper
    _scaler: GradScaler | None
    _closed: bool
    _deferred: "DeferredReduction | None"
    _drops_nonfinite: bool
    _has_received: bool
    _finite: list[Tensor]

    dropped = 0
    """Dropped micro-batches of all windows."""

    @property
    def steps(self) -> int:
        """N, the micro-batches of a window."""
        return self._settings.steps

    @disable_dynamo
    def backward(self, loss: Tensor, weight: float | None = None) -> None:
        """Run the backward pass of one micro-batch; gradients are folded and freed on the way.

        Inside :meth:`micro_batch` it is one of several passes of that micro-batch.

        Args:
            loss: Of one element.
            weight: Factor of this micro-batch's gradient in the window's sum. None: 1/steps, and
                the window gives the mean, a shorter one too. Where the loss is normalised over the whole window
                already, as with Hugging Face's ``num_items_in_batch``: 1. With n of the window's T tokens and a
                mean loss: n/T.

        Raises:
            RuntimeError: The window is complete, or a pass of it broke off.
            ValueError: Weights are given for some micro-batches of a window only.
        """
        if self._window.is_open and not self._window.failed:
            if weight is not None:
                raise ValueError("weight inside micro_batch(): give it to micro_batch(weight=...)")
            for entry in self._entries:
                if entry.updated:
                    raise late_gradient_error(entry)
            self._run_backward(loss)
            return
        with self.micro_batch(weight=weight):
            self._run_backward(loss)

    @contextmanager
    def micro_batch(self, *, weight: float | None = None, last: bool | None = None) -> Iterator[None]:
        """Run the backward passes of one micro-batch inside this context: others' calls, or several.

        A gradient that is put into ``.grad`` by hand, as from ``torch.autograd.grad``, is folded when the
        micro-batch ends. With a scaler it must be the gradient of the scaled loss.

        Args:
            weight: As in :meth:`backward`.
            last: True if it ends the window; None: decided by ``steps``.

        Raises:
            RuntimeError: As in :meth:`backward`.
            ValueError: As in :meth:`backward`.
        """
        self.begin_micro_batch(weight=weight, last=last)
        try:
            yield
        except BaseException:
            self._window.failed = True
            raise
        self.end_micro_batch()

    @disable_dynamo
    def begin_micro_batch(self, *, weight: float | None = None, last: bool | None = None) -> None:
        """Expect gradients from now on; for loops that cannot use :meth:`micro_batch`."""
        self._check_idle()
        self._begin_window_if_freed()
        window = self._window
        if window.ended:
            raise RuntimeError("the window is complete: step() before the next micro-batch, or zero_grad() to drop it")
        if window.seen == 0:
            self._entries.sync()
            if self._deferred is not None:
                self._deferred.begin(self._entries)
        self._check_no_gradients()
        given = weight is not None
        if window.weighted not in (None, given):
            raise ValueError(
                f"weight={weight!r} in micro-batch {window.seen + 1}: give one for every micro-batch of a "
                "window, or for none"
            )
        window.last = window.seen + 1 >= self.steps if last is None else last
        if self.steps == 1 and not window.last:
            raise ValueError("last=False with steps=1: construct the accumulator with more steps")
        self._folded_grads.begin()
        self._finite.clear()
        window.weighted = given
        window.weight = 1 / self.steps if weight is None else float(weight)

    @disable_dynamo
    def end_micro_batch(self) -> None:
        """End the micro-batch; the last one completes the window."""
        window = self._window
        if not window.is_open:
            raise RuntimeError("end_micro_batch() without begin_micro_batch()")
        if not window.is_dropped:
            self._fold_remaining()
        if not window.is_dropped:
            assert window.weight is not None
            window.total_weight += window.weight
        if window.last:
            self._end()
        window.weight, window.is_dropped = None, False
        window.seen += 1

    def drop_micro_batch(self) -> None:
        """Drop the open micro-batch, as if it had never been.

        It counts for the end of the window, and not for its mean. Called before the backward pass, as where the loss
        is not finite, it costs nothing; gradients that are folded already are undone where ``drop_nonfinite=True``
        keeps a second copy of the sketches, those of a failed backward pass too. With sharded
        parameters all processes drop alike.

        Raises:
            RuntimeError: No micro-batch is open, or its gradients cannot be taken back.
        """
        window = self._window
        if not window.is_open:
            raise RuntimeError("drop_micro_batch() outside a micro-batch: call it inside `with micro_batch():`")
        if window.is_dropped:
            return
        self._undo_folds()
        self.dropped += 1
        window.dropped += 1
        window.is_dropped = True
        if window.failed:  # the error has left micro_batch() already
            window.failed = False
            self.end_micro_batch()

    @contextmanager
    def late_pass(self) -> Iterator[None]:
        """Let autograd add the gradients of a pass to the sum in ``.grad``; see :attr:`accepts_late_passes`."""
        self._check_idle()
        window = self._window
        window.is_late, window.norm = True, None
        try:
            yield
        except BaseException:
            window.failed = True
            raise
        finally:
            window.is_late = False

    def fold(self, entry: ParamEntry) -> None:
        """Fold the gradient in the ``.grad`` of one parameter; its hook calls this."""
        window, grad = self._window, entry.local_grad()
        if grad is None or window.is_late:
            return
        if self._deferred is not None:
            raise RuntimeError(
                f"{entry.name} has a gradient in .grad, reduced by FSDP2 or put there by hand, and defer_reduction "
                "folds gradients before they are reduced: run backward passes through the model that it was given, or "
                "leave it out"
            )
        if window.is_dropped:
            entry.param.grad = None
            return
        weight = self._checked_weight(entry, grad)
        with no_grad_no_autocast(grad.device):
            if self._drops_nonfinite:
                self._finite.append(grad.isfinite().all())
            if window.last and self._stepper.keeps_last:
                self._stepper.last_gradient(entry, window)
                return
            assert entry.sketch is not None
            if self._drops_nonfinite and not entry.folded:
                entry.sketch.snapshot()
            entry.sketch.add(grad, weight, window.index, measure_noise=not self._stepper.keeps_last)
            self._folded_grads.free(entry)

    def fold_unreduced(self, entry: ParamEntry, unsharded: Tensor) -> None:
        """Fold the gradient of a whole tensor under FSDP2 before it is reduced; a hook calls this."""
        window, grad = self._window, unsharded.grad
        if grad is None:
            return
        if not window.is_dropped:
            assert self._deferred is not None
            assert entry.unreduced is not None
            weight = self._checked_weight(entry, grad) / self._deferred.ranks.size
            with no_grad_no_autocast(grad.device):
                entry.unreduced.add(grad, weight, window.index, measure_noise=True)
            entry.folded = True
        unsharded.grad = None

    def _checked_weight(self, entry: ParamEntry, grad: Tensor) -> float:
        """Return the weight of the open micro-batch for a gradient.

        Raises:
            RuntimeError: No micro-batch is open, or the gradient is sparse.
        """
        if self._window.weight is None:
            raise RuntimeError(f"a gradient of {entry.name} outside a micro-batch: {self.remedies.backward}")
        if grad.is_sparse:
            raise RuntimeError(
                f"the gradient of {entry.name} is sparse: the accumulator takes dense gradients; "
                "give sparse=False to its embedding"
            )
        return self._window.weight

    def _fold_remaining(self) -> None:
        """Fold gradients that were put into ``.grad`` by hand; drop the micro-batch if one is not finite."""
        window = self._window
        window.failed = True  # unless all below succeeds
        if not (window.last and self._stepper.keeps_last):
            self._folded_grads.check()
        for entry in self._entries:
            if entry.param.grad is not None:
                self.fold(entry)
        window.failed = False
        if self._finite and not torch.stack([each.to(self._entries.device) for each in self._finite]).all():
            self.drop_micro_batch()

    def _undo_folds(self) -> None:
        """Free the gradients of the open micro-batch, and undo its folds.

        Raises:
            RuntimeError: They are used already, or cannot be undone; nothing has been changed then.
        """
        late = [entry for entry in self._entries if entry.updated or (entry.folded and not self._drops_nonfinite)]
        if late:
            raise RuntimeError(
                f"{len(late)} gradients of the micro-batch are folded or used already: drop_micro_batch() before the "
                "backward pass, or construct the accumulator with drop_nonfinite=True (a second copy of the sketches); "
                f"{self.remedies.drop}"
            )
        for entry in self._entries:
            entry.param.grad = None
            if entry.folded:
                assert entry.sketch is not None
                entry.sketch.restore()
                entry.folded = False

    def _run_backward(self, loss: Tensor) -> None:
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def _begin_window_if_freed(self) -> None:
        """Begin a new window where the mean was left in ``.grad`` and has been used and freed."""
        raise NotImplementedError

    def _end(self) -> None:
        """End the window."""
        raise NotImplementedError

    def _check_no_gradients(self) -> None:
        """Refuse gradients that belong to no micro-batch.

        Raises:
            RuntimeError: With the remedy.
        """
        for entry in self._entries:
            if entry.param.grad is not None:
                raise RuntimeError(
                    f"{entry.name} has a gradient from before this window, which would be counted again: "
                    "optimizer.zero_grad() first (with set_to_none=True, its default)"
                    if self._window.seen == 0
                    else f"{entry.name} has a gradient that no backward pass of this window has seen: put gradients "
                    "into .grad inside micro_batch(), before it ends, or free it (param.grad = None)"
                )

    def _check_idle(self) -> None:
        """Refuse to continue inside a micro-batch, after a failed one, and after close()."""
        if self._closed:
            raise RuntimeError("the accumulator is closed: construct a new one")
        if self._window.failed:
            raise RuntimeError(
                "a backward pass or step() of this window failed, and the window holds a part of its gradients: "
                f"{self.remedies.drop}"
            )
        if self._window.is_open:
            raise RuntimeError("a micro-batch is open: end_micro_batch() first, or zero_grad() to drop the window")

    def _note_received(self) -> None:
        self._has_received = self._has_received or any(entry.has_gradient for entry in self._entries)

    def check_received(self) -> None:
        """Refuse to step where no parameter of the optimizers has had a gradient yet.

        Raises:
            RuntimeError: Naming the parameters, and the remedy.
        """
        if not self._window.ended:  # else a .grad may hold the zeros of GradWriteProbe
            self._note_received()
        if not self._has_received:
            listed = list(self._entries.listed())
            frozen = sum(not each.param.requires_grad for each in listed)
            names = ", ".join(each.name for each in listed[:3])
            raise RuntimeError(
                f"no backward pass has reached a parameter of the optimizer ({len(listed)}: {names}, ..., of which "
                f"{frozen} are frozen): others are trained; make the optimizer of the parameters that are "
                "trained, after the model has got its adapters (get_peft_model, peft_config)"
            )

    def _check_complete(self, what: str) -> None:
        self._check_idle()
        if not self._window.ended:
            raise RuntimeError(
                f"{what} after {self._window.seen} of {self.steps} micro-batches: go on until `complete`, "
                "or flush() to end the window early"
            )
