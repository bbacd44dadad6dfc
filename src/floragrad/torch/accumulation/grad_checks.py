"""Checks that no other code writes to ``.grad``: after a fold, or where the window's mean is not stored."""

from collections.abc import Iterable

import torch
from torch import Tensor

from floragrad.torch.accumulation.window import ParamEntry
from floragrad.torch.validation import gradient_dtype


class FoldedGradCheck:
    """Check that ``.grad`` stays free after a fold until the micro-batch ends.

    DistributedDataParallel puts averaged zeros where it finds no gradient. Some of its options make it skip parameters
    without a gradient; with several processes the smallest parameter's ``.grad`` therefore holds zeros, and a write to
    them reveals the wrapper.

    Args:
        entries: The parameters.
        several: True if several processes train.
    """

    def __init__(self, entries: Iterable[ParamEntry], several: bool) -> None:
        self._entries = entries
        self._several = several
        self._smallest: ParamEntry | None = None
        self._mark: tuple[int, int] | None = None

    def begin(self) -> None:
        """Begin a micro-batch."""
        for entry in self._entries:
            entry.folded = False
        self._mark = None
        whole = (entry for entry in self._entries if entry.part is None) if self._several else ()
        self._smallest = min(whole, key=lambda entry: entry.param.numel(), default=None)

    def free(self, entry: ParamEntry) -> None:
        """Free a folded gradient."""
        entry.folded = True
        entry.param.grad = None
        if entry is self._smallest:
            zeros = entry.param.grad = torch.zeros_like(entry.param, dtype=gradient_dtype(entry.param))
            self._mark = zeros.data_ptr(), zeros._version

    def check(self) -> None:
        """Check all parameters at the end of a micro-batch.

        Raises:
            RuntimeError: A parameter whose gradient was folded has one again, or one that is not as it was.
        """
        smallest = self._smallest
        if smallest is not None and self._mark is not None:
            zeros = smallest.param.grad
            if zeros is not None and (zeros.data_ptr(), zeros._version) == self._mark:
                smallest.param.grad = None
            self._mark = None
        for entry in self._entries:
            if entry.folded and entry.param.grad is not None:
                raise RuntimeError(
                    f"{entry.name} has a gradient again after it was folded: with DistributedDataParallel run forward "
                    "and backward inside `with model.no_sync():`, or train the module that it wraps; the accumulator "
                    "averages over the processes itself. A gradient put into .grad by hand, or by a hook, must come "
                    "before any other of this micro-batch: take it from torch.autograd.grad, which fills no .grad, and "
                    "register the hook before the accumulator is made"
                )


class GradWriteProbe:
    """Zeros in the smallest parameter's ``.grad``; a write to them reveals code that changes gradients.

    ``torch.nn.utils.clip_grad_norm_`` multiplies every gradient that it finds in place, and finds none with release.
    Sharded parameters are left alone: their tensors do not count how often they are written to.

    Args:
        entries: The parameters.
    """

    def __init__(self, entries: Iterable[ParamEntry]) -> None:
        self._entries = entries
        self._placed: tuple[Tensor, Tensor, int] | None = None

    def place(self) -> None:
        """Put zeros where there is no gradient."""
        params = [entry.param for entry in self._entries if entry.part is None and entry.param.numel()]
        param = min(params, key=lambda each: each.numel(), default=None)
        if param is not None and param.grad is None:
            zeros = param.grad = torch.zeros_like(param, dtype=gradient_dtype(param))
            self._placed = param, zeros, zeros._version

    def remove(self) -> bool:
        """Remove the zeros.

        Returns:
            True if they were written to.
        """
        placed, self._placed = self._placed, None
        if placed is None or placed[0].grad is not placed[1]:
            return False
        placed[0].grad = None
        return placed[1]._version != placed[2]
