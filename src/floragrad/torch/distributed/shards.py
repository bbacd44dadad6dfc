"""Sharded parameters (DTensor): the local part of a tensor, and the placement of its state.

Plans follow from global shapes. Rows never mix, so a shard of rows keeps its rows' momentum; columns' statistics and
learned weights are replicated. A tensor split along its columns (row-wise tensor parallelism) replicates sketches of
whole rows.

This module imports ``torch.distributed.tensor``; :mod:`floragrad.torch.distributed.collectives` does not.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

# Not public; torch's own checkpoints use it.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from floragrad.policy import QUANTIZATION_BLOCK, SCALAR_STATE, Buffer, MatrixView, TensorPlan, leading_shape
from floragrad.torch.part import Axis, Part

_OF_COLUMNS = ("col_var", "projection_weight")


def stepped_placements(param: DTensor, view: MatrixView | None) -> tuple[Placement, ...]:
    """Return the placements of a parameter during a step.

    A single matrix with leading dimensions of size 1, (1, rows, columns), is on one device if one of these is sharded.
    Its state has no such dimension and is replicated, so all devices step all of it.

    Args:
        param: The parameter.
        view: Of its global shape.
    """
    if view is None or view.batch > 1:
        return tuple(param.placements)
    axes = _axes(tuple(param.shape), view)
    return tuple(
        Replicate() if isinstance(each, Shard | _StridedShard) and axes[_dim(each)] == "batch" else each
        for each in param.placements
    )


def stepped_local(param: DTensor, view: MatrixView | None) -> Tensor:
    """Return the local part of a parameter for a step; a copy where :func:`stepped_placements` differ."""
    placements = stepped_placements(param, view)
    if placements != tuple(param.placements):
        param = param.redistribute(placements=placements)
    return param.to_local()


def stepped_shape(param: DTensor, view: MatrixView | None) -> tuple[int, ...]:
    """Return the shape of :func:`stepped_local`."""
    return _local(param, tuple(param.shape), stepped_placements(param, view))[0]


def write_back(stepped: Tensor, param: DTensor, view: MatrixView | None) -> None:
    """Write this device's part of :func:`stepped_local` into the parameter, where it is a copy."""
    local = param.to_local()
    if stepped_placements(param, view) != tuple(param.placements) and local.numel():
        local.copy_(stepped)


def part_of(
    name: str, param: DTensor, view: MatrixView | None, placements: tuple[Placement, ...] | None = None
) -> Part:
    """Return the local part of a sharded parameter.

    Args:
        name: For messages.
        param: The parameter.
        view: Of its global shape.
        placements: Placements other than the parameter's.

    Raises:
        ValueError: It is split along an unsupported dimension, with the remedy.
    """
    whole, placements = tuple(param.shape), tuple(param.placements) if placements is None else placements
    shape, offset = _local(param, whole, placements)
    axes = _axes(whole, view)
    split: dict[Axis, tuple[int, ...]] = {}
    for mesh_dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        axis = axes[_dim(placement)] if isinstance(placement, Shard | _StridedShard) else None
        if axis is None:
            raise ValueError(
                f"{name} of shape {whole} is placed as {param.placements}: floragrad takes tensors that "
                "are replicated, or split along dimensions of their matrix view; shard it on dimension 0"
            )
        if param.device_mesh.size(mesh_dim) > 1:
            split[axis] = (*split.get(axis, ()), mesh_dim)
    by_columns = bool(axes) and axes[-1] == "columns"
    columns = slice(offset[-1], offset[-1] + shape[-1]) if by_columns else slice(0, view.columns if view else 1)
    return Part(
        _local_view(view, axes, shape),
        leading_shape(whole, view),
        _leading(view, axes, shape, offset),
        columns,
        split,
        prod(param.device_mesh.size(dim) for dim in split.get("columns", ())),
        param.device_mesh,
    )


def local_buffers(param: DTensor, plan: TensorPlan) -> Mapping[str, Buffer]:
    """Return shape and dtype of the local part of each state tensor."""
    return {
        key: Buffer(_local(param, buffer.shape, _placements(param, plan, key))[0], buffer.dtype)
        for key, buffer in plan.buffers.items()
    }


def sharded_state(param: DTensor, plan: TensorPlan, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state as DTensors over the parameter's mesh; ``step`` and ``tensor_id`` stay plain.

    Args:
        param: The parameter.
        plan: Of its global shape.
        local: The buffers of :func:`local_buffers`.
    """
    return {
        key: value
        if key in SCALAR_STATE
        else DTensor.from_local(
            value,
            param.device_mesh,
            _placements(param, plan, key),
            run_check=False,
            shape=torch.Size(plan.buffers[key].shape),
            stride=_strides(plan.buffers[key].shape),
        )
        for key, value in local.items()
    }


def distribute_state_tensor(key: str, value: Tensor, param: DTensor, plan: TensorPlan) -> Tensor:
    """Return a loaded state tensor with the placements of its plan; a whole one is cut without communication."""
    if key in SCALAR_STATE:
        return value
    mesh, placements = param.device_mesh, _placements(param, plan, key)
    if isinstance(value, DTensor):
        if value.device_mesh == mesh:
            return value if tuple(value.placements) == placements else value.redistribute(placements=placements)
        value = value.full_tensor()
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def contiguous(value: DTensor) -> DTensor:
    """Return the same tensor with a contiguous local part."""
    local = value.to_local()
    return value if local.is_contiguous() else with_local(value, local.contiguous())


def with_local(value: DTensor, local: Tensor) -> DTensor:
    """Return a tensor of the same global shape and placements with another local part."""
    return DTensor.from_local(
        local,
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=_strides(value.shape),
    )


def local_gradient(param: DTensor, placements: tuple[Placement, ...] | None = None) -> Tensor:
    """Return the local gradient in the parameter's placements, or in others."""
    grad = param.grad
    wanted = tuple(param.placements) if placements is None else placements
    if not isinstance(grad, DTensor):
        raise TypeError(f"the gradient of a parameter placed as {param.placements} is a plain tensor: give a DTensor")
    if tuple(grad.placements) != wanted:
        grad = grad.redistribute(param.device_mesh, wanted)
    return grad.to_local()


def as_gradient(param: DTensor, local: Tensor) -> DTensor:
    """Return a local gradient as a DTensor in the parameter's placements."""
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=_strides(param.shape)
    )


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return torch.empty(shape, dtype=torch.float32, device="meta").stride()


def _axes(shape: tuple[int, ...], view: MatrixView | None) -> list[Axis | None]:
    """Return the view's axis of each dimension of the parameter; None where it may not be split."""
    ndim = len(shape)
    if view is None:
        return ["rows"] * ndim
    if ndim > 2 and view == MatrixView(1, shape[0], prod(shape[1:])):
        return ["rows", *([None] * (ndim - 1))]
    return [*(["batch"] * (ndim - 2)), "rows", "columns"]  # type: ignore[list-item]


def _local_view(view: MatrixView | None, axes: list[Axis | None], shape: Sequence[int]) -> MatrixView:
    if view is None:
        return MatrixView(1, prod(shape), 1)
    if axes[-1] is None:
        return MatrixView(1, shape[0], view.columns)
    return MatrixView(prod(shape[:-2]), shape[-2], shape[-1])


def _leading(
    view: MatrixView | None, axes: list[Axis | None], shape: Sequence[int], offset: Sequence[int]
) -> tuple[slice, ...]:
    """Return the local slices of the dimensions that index rows."""
    local = [slice(first, first + size) for first, size in zip(offset, shape, strict=True)]
    if view is None:
        return tuple(local)
    if prod(shape) == 0:
        return (slice(0, 0),) * (len(shape) - 1 if view.batch > 1 else 1)
    if axes[-1] is None:
        return (local[0],)
    return tuple(local[:-1]) if view.batch > 1 else (local[-2],)


def _placements(param: DTensor, plan: TensorPlan, key: str) -> tuple[Placement, ...]:
    """Return the placements of a state tensor over the parameter's mesh."""
    return tuple(_state_placement(each, plan, key) for each in param.placements)


def _state_placement(placement: Placement, plan: TensorPlan, key: str) -> Placement:
    if placement.is_replicate() or key in SCALAR_STATE:
        return Replicate()
    dim = _dim(placement)
    axis = _axes(plan.shape, plan.view)[dim]
    if key == "variance" or plan.view is None:
        return placement
    last = len(plan.buffers[key].shape) - 1
    if axis == "batch":
        return placement if plan.view.batch > 1 else Replicate()
    if axis == "rows":
        return Replicate() if key in _OF_COLUMNS else _moved(placement, len(plan.leading) - 1)
    is_sketch = key in ("exp_avg", "exp_avg_scale") and plan.momentum == "sketch"
    return Replicate() if key == "row_var" or is_sketch else _moved(placement, last)


def _dim(placement: Placement) -> int:
    dim: int = placement.dim  # type: ignore[attr-defined]
    return dim


def _moved(placement: Placement, dim: int) -> Placement:
    """Return the same split of another dimension."""
    if isinstance(placement, _StridedShard):
        return _StridedShard(dim, split_factor=placement.split_factor)
    return Shard(dim)


def _local(
    param: DTensor, shape: Sequence[int], placements: Sequence[Placement]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and offset of the local part of a tensor placed over the parameter's mesh."""
    local, offset = compute_local_shape_and_global_offset(tuple(shape), param.device_mesh, placements)
    return tuple(int(size) for size in local), tuple(int(first) for first in offset)


def check_columns(name: str, param: DTensor, plan: TensorPlan, part: Part) -> None:
    """Refuse a state that a tensor split along its columns cannot keep.

    Raises:
        ValueError: With the remedy.
    """
    if "columns" not in part.split or plan.view is None:
        return
    cuts_blocks = plan.view.columns % (QUANTIZATION_BLOCK * part.column_parts) != 0
    where = f"{name} of shape {plan.shape} is split along its columns ({param.placements})"
    if plan.second_moment_dtype != "float32" and cuts_blocks:
        raise ValueError(
            f"{where} and keeps its second moment in {plan.second_moment_dtype}, whose blocks of {QUANTIZATION_BLOCK} "
            "columns it cuts: give its group second_moment_dtype='float32'"
        )
    if plan.momentum == "none":
        return
    if plan.momentum == "sketch":
        if plan.projection == "adaptive":
            raise ValueError(f"{where}: learned weights need whole rows; give its group projection='sign'")
        return
    if plan.state_dtype == "int4" or (plan.state_dtype == "int8" and cuts_blocks):
        raise ValueError(
            f"{where} and keeps every column of its momentum in {plan.state_dtype}, whose blocks of "
            f"{QUANTIZATION_BLOCK} columns it cuts: give its group state_dtype='bfloat16'"
        )
