"""Notices by habit: gradients changed in ``.grad`` where the window's mean is not."""

from collections.abc import Iterable

import torch
from torch import Tensor

from floragrad.torch.accumulation.window import Slot


class Lure:
    """Zeros in the smallest parameter's ``.grad``, which tell whether somebody writes to gradients.

    ``torch.nn.utils.clip_grad_norm_`` multiplies every gradient that it finds in place, and finds none with release.
    Sharded parameters are left alone: their tensors do not count how often they are written to.

    Args:
        slots: The parameters.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = slots
        self._laid: tuple[Tensor, Tensor, int] | None = None

    def lay(self) -> None:
        """Leave zeros, where there is no gradient."""
        params = [slot.param for slot in self._slots if slot.part is None and slot.param.numel()]
        param = min(params, key=lambda each: each.numel(), default=None)
        if param is not None and param.grad is None:
            zeros = param.grad = torch.zeros_like(param)
            self._laid = param, zeros, zeros._version

    def withdraw(self) -> bool:
        """Take the zeros away.

        Returns:
            Whether they were written to.
        """
        laid, self._laid = self._laid, None
        if laid is None or laid[0].grad is not laid[1]:
            return False
        laid[0].grad = None
        return laid[1]._version != laid[2]
