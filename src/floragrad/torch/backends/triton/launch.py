"""Launch of a kernel: its grid and its arguments."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """Launch of one kernel.

    Attributes:
        kernel: A function of ``kernels``.
        grid: Programs along three axes.
        arguments: Tensors and numbers, another value of which compiles nothing (but for integers that are 1, or
            multiples of 16, where others are not).
        constants: Compile-time constants of the kernel.
        warps: Of a program.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Tensor | int | float]
    constants: Mapping[str, Any]
    warps: int = 4

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options; without fused multiply-add, as on CPUs."""
        return {"num_warps": self.warps, "enable_fp_fusion": False}

    def run(self) -> None:
        """Launch it on the current device, without synchronization."""
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the one that kernels are launched on."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)
