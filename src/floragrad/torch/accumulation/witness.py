"""Gradients are freed as they are folded; somebody else who averages them over processes is noticed."""

from collections.abc import Iterable

import torch

from floragrad.torch.accumulation.window import Slot
from floragrad.torch.handover import gradient_dtype


class Witness:
    """Frees folded gradients, and sees whether they stay what they are until the micro-batch ends.

    DistributedDataParallel puts averaged zeros where it finds no gradient. Under some of its options it leaves alone
    what has none; so zeros are left in the smallest parameter's ``.grad``, where there are several processes, and it
    is told by whether they were written to.

    Args:
        slots: The parameters.
        several: Whether several processes train.
    """

    def __init__(self, slots: Iterable[Slot], several: bool) -> None:
        self._slots = slots
        self._several = several
        self._smallest: Slot | None = None
        self._mark: tuple[int, int] | None = None

    def begin(self) -> None:
        """A micro-batch begins."""
        for slot in self._slots:
            slot.folded = False
        self._mark = None
        self._smallest = min(self._slots, key=lambda slot: slot.param.numel(), default=None) if self._several else None

    def free(self, slot: Slot) -> None:
        """Free a gradient that was folded."""
        slot.folded = True
        slot.param.grad = None
        if slot is self._smallest:
            zeros = slot.param.grad = torch.zeros_like(slot.param, dtype=gradient_dtype(slot.param))
            self._mark = zeros.data_ptr(), zeros._version

    def check(self) -> None:
        """The micro-batch ends.

        Raises:
            RuntimeError: A parameter whose gradient was folded has one again, or one that is not as it was.
        """
        smallest = self._smallest
        if smallest is not None and self._mark is not None:
            zeros = smallest.param.grad
            if zeros is not None and (zeros.data_ptr(), zeros._version) == self._mark:
                smallest.param.grad = None
            self._mark = None
        for slot in self._slots:
            if slot.folded and slot.param.grad is not None:
                raise RuntimeError(
                    f"{slot.name} has a gradient again after it was folded: with DistributedDataParallel run forward "
                    "and backward inside `with model.no_sync():`, or train the module that it wraps; the accumulator "
                    "averages over the processes itself. A gradient put into .grad by hand, or by a hook, must come "
                    "before any other of this micro-batch: take it from torch.autograd.grad, which fills no .grad, and "
                    "register the hook before the accumulator is made"
                )
