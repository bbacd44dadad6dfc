"""Triton backend. It imports triton and the kernels once a tensor uses them."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from math import ceil
from typing import Final

import torch
from torch import Tensor

from floragrad.policy import TensorPlan
from floragrad.torch.backends.switch import SWITCH, kernels_allowed
from floragrad.torch.context import ParamUpdate
from floragrad.torch.part import Part, Passes
from floragrad.torch.validation import is_plain, unsupported_memory

DEVICES: Final = {"cuda", "xpu"}
"""Kinds of devices that triton compiles for. Tests that run kernels in its interpreter add the CPU."""
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
"""Of parameters and gradients."""
MOST_SLICES: Final = 512
"""Columns that share an element of the momentum, at most: a program holds those of 64 elements in registers."""


def name() -> str:
    """Return the backend's name."""
    return "triton"


@cache
def absence() -> str:
    """Return why the kernels are missing; empty if they are there."""
    if not kernels_allowed():
        return f"{SWITCH}=eager"
    return "" if find_spec("triton") else "triton is not installed"


def unsupported_reason(tensor: Tensor, plan: TensorPlan, part: Part) -> str:
    """Return why the kernels do not support a parameter; empty if they do."""
    if tensor.device.type not in DEVICES:
        return f"on {tensor.device.type}"
    if absence():
        return absence()
    if plan.momentum == "sketch" and plan.projection == "gaussian":
        return "Gaussian projection"
    if plan.second_moment_dtype != "float32":
        return f"second moment in {plan.second_moment_dtype}"
    width = plan.width if plan.momentum == "sketch" else part.view.columns
    return _unsupported_part(part, width) or unsupported_memory(tensor, DTYPES)


def _unsupported_part(part: Part, width: int) -> str:
    """Return why the kernels cannot take a tensor's local part with a sketch of ``width`` columns."""
    ratio_reason = f"ratio above {MOST_SLICES}" if ceil(part.view.columns / width) > MOST_SLICES else ""
    return part.irregularity or ratio_reason


def supports(update: ParamUpdate) -> bool:
    """Return whether the kernels support the memory layout of this step's tensors."""
    param, grad, state, ctx = update
    return (
        not unsupported_reason(param, ctx.plan, ctx.part)
        and not unsupported_memory(grad, DTYPES)
        and param.numel() > 0
        and all(is_plain(value) for value in state.values())
    )


def can_fold(grad: Tensor, buffers: Mapping[str, Tensor], part: Part, width: int) -> bool:
    """Return whether the kernels can fold a gradient into a sign sketch, and decode into it.

    Args:
        grad: The gradient.
        buffers: Of the sketch.
        part: The local part of the tensor.
        width: Columns of the sketch.
    """
    return (
        grad.device.type in DEVICES
        and not absence()
        and not _unsupported_part(part, width)
        and not unsupported_memory(grad, DTYPES)
        and grad.numel() > 0
        and all(is_plain(buffer) and buffer.is_contiguous() for buffer in buffers.values())
    )


def passes(updates: Sequence[ParamUpdate]) -> Iterator[Passes]:
    """Yield the passes of each batch of tensors with equal shapes, dtypes, options and steps.

    Raises:
        RuntimeError: A CUDA graph is being captured.
    """
    if updates:
        for device in {update.param.device for update in updates}:
            check_not_capturing(device)
        from floragrad.torch.backends.triton.passes import passes_of

        yield from passes_of(updates)


def check_not_capturing(device: torch.device) -> None:
    """Refuse to be captured: every replay would repeat the same step.

    Raises:
        RuntimeError: A CUDA graph is being captured on the device.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step of Flora cannot be captured by torch.cuda.graph: it is counted on the host, so each replay would "
            "repeat its averaging weight, random signs and rounding bits; capture the forward and the backward pass, "
            "and call optimizer.step() after each replay"
        )
