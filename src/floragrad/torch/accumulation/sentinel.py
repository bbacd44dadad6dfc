"""Detection of gradients that are changed in ``.grad`` by habit, where the window's mean is not."""

from collections.abc import Iterable

import torch
from torch import Tensor

from floragrad.torch.accumulation.window import Slot
from floragrad.torch.handover import gradient_dtype


class SentinelGradient:
    """Zeros in the smallest parameter's ``.grad``, which tell whether somebody writes to gradients.

    ``torch.nn.utils.clip_grad_norm_`` multiplies every gradient that it finds in place, and finds none with release.
    Sharded parameters are left alone: their tensors do not count how often they are written to.

    Args:
        slots: The parameters.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = slots
        self._placed: tuple[Tensor, Tensor, int] | None = None

    def place(self) -> None:
        """Put zeros where there is no gradient."""
        params = [slot.param for slot in self._slots if slot.part is None and slot.param.numel()]
        param = min(params, key=lambda each: each.numel(), default=None)
        if param is not None and param.grad is None:
            zeros = param.grad = torch.zeros_like(param, dtype=gradient_dtype(param))
            self._placed = param, zeros, zeros._version

    def remove(self) -> bool:
        """Remove the zeros.

        Returns:
            Whether they were written to.
        """
        placed, self._placed = self._placed, None
        if placed is None or placed[0].grad is not placed[1]:
            return False
        placed[0].grad = None
        return placed[1]._version != placed[2]
