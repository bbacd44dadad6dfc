"""Report of a PyTorch optimizer, and the warning where it compresses little."""

from collections.abc import Iterable, Mapping, MutableMapping
from math import prod

import torch
from torch import Tensor

from floragrad._report import FROZEN, Report, ReportRow, low_compression_warning
from floragrad.policy import TensorPlan
from floragrad.torch.backends import backend_of
from floragrad.torch.context import Group, State
from floragrad.torch.distributed.collectives import is_sharded, to_local
from floragrad.torch.param_info import ParamInfo, ensure_state
from floragrad.torch.part import Part


def report_row(name: str, param: Tensor, plan: TensorPlan, part: Part, has_state: bool) -> ReportRow:
    """Return the row of one parameter; of a sharded one, with the bytes on this device.

    Args:
        name: The parameter's.
        param: The parameter.
        plan: Of its global shape.
        part: Its local part.
        has_state: True if it has a state; a frozen parameter has none, as in AdamW and Adafactor.
    """
    if not has_state:
        return ReportRow(name, plan.shape, plan.view, 1, "none", 0, 0, 0, FROZEN)
    buffers, shape = plan.buffers, plan.shape
    if is_sharded(param):
        from floragrad.torch.distributed.shards import local_buffers

        buffers, shape = local_buffers(param, plan), tuple(param.to_local().shape)
    return ReportRow(
        name=name,
        shape=plan.shape,
        view=plan.view,
        ratio=plan.ratio,
        momentum=plan.momentum,
        state_bytes=sum(buffer.nbytes for buffer in buffers.values()),
        adamw_bytes=adamw_bytes(shape, param.dtype),
        adafactor_bytes=adafactor_bytes(shape, param.dtype),
        reason=plan.reason,
        path=backend_of(to_local(param), plan, part),
    )


def make_report(infos: Mapping[Tensor, ParamInfo], states: MutableMapping[Tensor, State]) -> Report:
    """Return the report of an optimizer; the state of trained parameters is allocated where it is missing.

    Args:
        infos: Its parameters.
        states: Their states.
    """
    for param, info in infos.items():
        if param.requires_grad:
            ensure_state(param, info, states[param])
    return Report(
        tuple(
            report_row(info.name, param, info.plan, info.part, has_state="step" in states.get(param, {}))
            for param, info in infos.items()
        )
    )


def group_warning(rows: Iterable[tuple[ReportRow, Group]]) -> str:
    """Return :func:`floragrad._report.low_compression_warning` of an optimizer.

    Declared vocabulary, and groups without compression, do not count.

    Args:
        rows: The tensors of an optimizer with their groups.
    """
    return low_compression_warning(
        [row for row, group in rows if group["beta1"] and group["ratio"] != 1 and group["kind"] != "vocabulary"]
    )


def adamw_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of ``torch.optim.AdamW``'s state for one parameter: two moments and a step."""
    return 2 * prod(shape) * dtype.itemsize + 4


def adafactor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of Hugging Face's ``Adafactor(beta1=0.9)``'s momentum and second moment for one parameter."""
    itemsize = max(4, dtype.itemsize)
    second = prod(shape[:-1]) + prod(shape[:-2]) * shape[-1] if len(shape) > 1 else prod(shape)
    return itemsize * (prod(shape) + second)
