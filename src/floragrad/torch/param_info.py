"""Plan and state of each parameter of an optimizer, whole or sharded."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from floragrad._streams import Stream
from floragrad.policy import SCALAR_STATE, STATE_KEYS, Buffer, TensorPlan
from floragrad.torch.context import Group, State
from floragrad.torch.distributed.collectives import is_sharded, to_local
from floragrad.torch.distributed.flat import check_not_flat
from floragrad.torch.options import layout_options, plan_for
from floragrad.torch.part import Part
from floragrad.torch.projection import normalise_buckets, random_signs
from floragrad.torch.random import Philox
from floragrad.torch.validation import (
    Layout,
    check_parameter,
    check_shape,
    validate_gradient,
    validate_state,
)


@dataclass(frozen=True)
class ParamInfo:
    """Group, plan and layout of one parameter.

    Attributes:
        tensor_id: Key of its random streams: its position, or the id in a loaded state.
        name: For messages and reports.
        group: Its options.
        plan: Plan of its state.
        part: Its local part.
        layout: Shapes and dtypes of the local parameter and state.
        layout_options: Options that fix the layout of its state; they may not change while there is one.
    """

    tensor_id: int
    name: str
    group: Group
    plan: TensorPlan
    part: Part
    layout: Layout
    layout_options: Group


def group_infos(group: Group, first: int) -> dict[Tensor, ParamInfo]:
    """Return the infos of a group's parameters.

    Args:
        group: With all its options.
        first: Id of its first parameter.

    Raises:
        ValueError: One of them cannot be updated, with the remedy.
    """
    params = group["params"]
    names = group.get("param_names") or [f"parameter {first + i}" for i in range(len(params))]
    return new_infos(dict(zip(params, names, strict=True)), group, first)


def new_infos(named: Mapping[Tensor, str], group: Group, first: int) -> dict[Tensor, ParamInfo]:
    """Return infos with ids from ``first`` on.

    Args:
        named: Parameters of the group, and their names.
        group: With all its options.
        first: Id of the first.

    Raises:
        ValueError: One of them cannot be updated, with the remedy.
    """
    _check_supported(named)
    fixed = layout_options(group)
    return {
        param: _make_info(number, name, group, param, plan_for(param.shape, group), fixed)
        for number, (param, name) in enumerate(named.items(), first)
    }


def _check_supported(named: Mapping[Tensor, str]) -> None:
    for param, name in named.items():
        if param.is_complex():
            raise ValueError(f"{name} is complex ({param.dtype}): give torch.view_as_real of it")
    check_not_flat(list(named.values()), list(named))


def _make_info(tensor_id: int, name: str, group: Group, param: Tensor, plan: TensorPlan, fixed: Group) -> ParamInfo:
    return ParamInfo(tensor_id, name, group, plan, _part(name, param, plan), _layout(param, plan), fixed)


def replacement_info(info: ParamInfo, group: Group, param: Tensor) -> ParamInfo:
    """Return the info of a parameter that replaces another of its shape."""
    return _make_info(info.tensor_id, info.name, group, param, info.plan, info.layout_options)


def next_tensor_id(infos: Mapping[Tensor, ParamInfo]) -> int:
    """Return an id above those of all infos."""
    return max((info.tensor_id for info in infos.values()), default=-1) + 1


def with_saved_ids(
    infos: Mapping[Tensor, ParamInfo], states: Mapping[Any, Mapping[str, Any]]
) -> dict[Tensor, ParamInfo]:
    """Return the infos with the ids in their states.

    A parameter without a saved id keeps its own unless another's state has it; then it gets an unused one.
    """
    saved = {param: int(states[param]["tensor_id"]) for param in infos if "tensor_id" in states.get(param, ())}
    used, unused = set(saved.values()), max([next_tensor_id(infos) - 1, *saved.values()]) + 1
    numbered = {}
    for param, info in infos.items():
        tensor_id = saved.get(param, info.tensor_id)
        if param not in saved and tensor_id in used:
            tensor_id, unused = unused, unused + 1
        numbered[param] = replace(info, tensor_id=tensor_id)
    return numbered


def convert_scalars(state: State, tensor_id: int) -> None:
    """Convert ``step`` and ``tensor_id`` to int64 on the CPU.

    States of earlier releases have a float32 step and no id.
    """
    if "tensor_id" not in state:
        state["tensor_id"] = torch.tensor(tensor_id, dtype=torch.int64, device="cpu")
    for key in SCALAR_STATE:
        if key in state and (state[key].dtype != torch.int64 or not state[key].is_cpu):
            state[key] = state[key].to("cpu", torch.int64)


@torch.inference_mode(False)
def initial_state(
    plan: TensorPlan, group: Group, tensor_id: int, device: torch.device, buffers: Mapping[str, Buffer] | None = None
) -> State:
    """Return the initial state: zeros, and for ``"adaptive"`` random signs over their bucket's norm.

    Args:
        plan: Of the tensor.
        group: Its options.
        tensor_id: Key of its random streams.
        device: Where the buffers are allocated.
        buffers: The local parts of the plan's buffers; None: all of them.
    """
    state = {
        key: torch.zeros(buffer.shape, dtype=getattr(torch, buffer.dtype), device=device)
        for key, buffer in (plan.buffers if buffers is None else buffers).items()
    }
    # The tensor id is no zero, and on the meta device these still have values.
    for key, value in zip(SCALAR_STATE, (0, tensor_id), strict=True):
        state[key] = torch.tensor(value, dtype=torch.int64, device="cpu")
    if "projection_weight" in state and device.type != "meta":
        weight = state["projection_weight"]
        source = Philox(group["seed"], tensor_id, 0, Stream.MOMENTUM)
        signs = random_signs(source, weight.shape[-1], device).expand_as(weight)
        weight.copy_(normalise_buckets(signs, plan.width, signs))
    return state


def initial_param_state(param: Tensor, info: ParamInfo) -> State:
    """Return the initial state of a parameter, on its device and in its placements."""
    if not is_sharded(param):
        return initial_state(info.plan, info.group, info.tensor_id, param.device)
    from floragrad.torch.distributed.shards import local_buffers, sharded_state

    buffers = local_buffers(param, info.plan)
    local = initial_state(info.plan, info.group, info.tensor_id, param.device, buffers)
    return sharded_state(param, info.plan, local)


def ensure_state(param: Tensor, info: ParamInfo, state: State) -> State:
    """Return a parameter's state, allocated if it is new, on the parameter's current device.

    Args:
        param: The parameter.
        info: Its plan and options.
        state: Its state in the optimizer, filled in place.
    """
    if state.keys().isdisjoint(STATE_KEYS):
        state.update(initial_param_state(param, info))
    convert_scalars(state, info.tensor_id)
    device = param.device
    # The model may have left the meta device, or moved to another, after the optimizer was made.
    elsewhere = [key for key in info.layout.state if key in state and state[key].device != device]
    if any(state[key].is_meta for key in elsewhere):
        state.update(initial_param_state(param, info))
    for key in elsewhere:
        state[key] = state[key].to(device)
    return state


class TensorIdCache:
    """Cache of the ids in parameters' states, keyed by the version of their tensors."""

    def __init__(self) -> None:
        self._known: dict[Tensor, tuple[Tensor, int | None, int]] = {}

    def of(self, param: Tensor, state: State) -> int:
        """Return the id in a parameter's state."""
        kept = state["tensor_id"]
        version = None if kept.is_inference() else kept._version
        known = self._known.get(param)
        if known is None or version is None or known[0] is not kept or known[1] != version:
            known = self._known[param] = (kept, version, int(kept.item()))
        return known[2]

    def forget(self) -> None:
        """Clear the cache."""
        self._known.clear()


def distribute_state(param: Tensor, info: ParamInfo, state: State) -> State:
    """Return a state in the placements of the parameter: sharded for a DTensor, else whole."""
    if not is_sharded(param):
        return {key: value.full_tensor() if is_sharded(value) else value for key, value in state.items()}
    from floragrad.torch.distributed.shards import distribute_state_tensor

    return {key: distribute_state_tensor(key, value, param, info.plan) for key, value in state.items()}


def _part(name: str, param: Tensor, plan: TensorPlan) -> Part:
    """Return the local part of a parameter."""
    if not is_sharded(param):
        return Part.whole(plan.shape, plan.view)
    from floragrad.torch.distributed.shards import check_columns, part_of, stepped_placements

    part = part_of(name, param, plan.view, stepped_placements(param, plan.view))
    check_columns(name, param, plan, part)
    return part


def _layout(param: Tensor, plan: TensorPlan) -> Layout:
    """Return shapes and dtypes of the local parameter and state."""
    buffers, shape = plan.buffers, tuple(param.shape)
    if is_sharded(param):
        from floragrad.torch.distributed.shards import local_buffers, stepped_shape

        buffers, shape = local_buffers(param, plan), stepped_shape(param, plan.view)
    return Layout.of(shape, {key: each for key, each in buffers.items() if key not in SCALAR_STATE})


def validate_update(param: Tensor, info: ParamInfo, state: State) -> tuple[Tensor, Tensor, State]:
    """Return the local parameter, gradient and state, checked against the plan; no value is changed.

    Raises:
        RuntimeError: Naming the tensor that differs from its plan.
        TypeError: The gradient of a sharded parameter is a plain tensor.
    """
    check_shape(info.name, param.shape, info.plan.shape)
    if not is_sharded(param):
        assert param.grad is not None
        check_parameter(info.name, param)
        grad = validate_gradient(info.name, param.grad, info.layout.shape, param.dtype, param.device)
        return param, grad, validate_state(info.name, state, info.layout)
    from floragrad.torch.distributed.shards import contiguous, local_gradient, stepped_local, stepped_placements

    state.update({key: contiguous(value) for key, value in state.items() if is_sharded(value)})
    local, local_state = stepped_local(param, info.plan.view), {key: to_local(value) for key, value in state.items()}
    check_shape(f"{info.name}, on this device,", local.shape, info.layout.shape)
    check_parameter(info.name, local)
    grad = local_gradient(param, stepped_placements(param, info.plan.view))
    grad = validate_gradient(info.name, grad, info.layout.shape, param.dtype, local.device)
    return local, grad, validate_state(info.name, local_state, info.layout)


def write_back(param: Tensor, stepped: Tensor, plan: TensorPlan) -> None:
    """Write an updated local part into its parameter, where it is a copy."""
    if is_sharded(param):
        from floragrad.torch.distributed import shards

        shards.write_back(stepped, param, plan.view)


def unique_params(params: Any) -> list[Any]:
    """Return the parameters in order without duplicates, so that tied weights are updated once."""
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, set):
        raise TypeError("parameters must be ordered: give a list, not a set")
    seen: set[int] = set()
    items, once = list(params), []
    for item in items:
        tensor = item[1] if isinstance(item, tuple) else item
        if id(tensor) not in seen:
            seen.add(id(tensor))
            once.append(item)
    if len(once) < len(items):
        warnings.warn(
            "a parameter group with duplicate parameters: each of them is kept, and updated, once",
            UserWarning,
            stacklevel=2,
        )
    return once
