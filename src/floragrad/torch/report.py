"""The report's rows of PyTorch's parameters."""

from math import prod

import torch
from torch import Tensor

from floragrad._report import ReportRow
from floragrad.policy import TensorPlan
from floragrad.torch.distributed.lockstep import is_sharded
from floragrad.torch.native.layout import path_of


def report_row(name: str, param: Tensor, plan: TensorPlan) -> ReportRow:
    """The row of one parameter; of a sharded one, with the bytes on this device."""
    buffers, here = plan.buffers, plan.shape
    if is_sharded(param):
        from floragrad.torch.distributed.shards import local_buffers

        buffers, here = local_buffers(param, plan), tuple(param.to_local().shape)
    return ReportRow(
        name=name,
        shape=plan.shape,
        view=plan.view,
        ratio=plan.ratio,
        momentum=plan.momentum,
        state_bytes=sum(buffer.nbytes for buffer in buffers.values()),
        adamw_bytes=adamw_bytes(here, param.dtype),
        adafactor_bytes=adafactor_bytes(here, param.dtype),
        reason=plan.reason,
        path=path_of(param, plan),
    )


def adamw_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of ``torch.optim.AdamW``'s state for one parameter: two numbers for each of its own, and a step."""
    return 2 * prod(shape) * dtype.itemsize + 4


def adafactor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of Hugging Face's ``Adafactor(beta1=0.9)``'s momentum and second moment for one parameter."""
    itemsize = max(4, dtype.itemsize)
    second = prod(shape[:-1]) + prod(shape[:-2]) * shape[-1] if len(shape) > 1 else prod(shape)
    return itemsize * (prod(shape) + second)
