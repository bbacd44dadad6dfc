"""Synchronization with parameter groups that were changed after the optimizer was constructed."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace

from torch import Tensor

from floragrad.torch.checkpoint import restore_state
from floragrad.torch.context import Group, State
from floragrad.torch.distributed.collectives import is_sharded
from floragrad.torch.distributed.flat import check_not_flattened
from floragrad.torch.options import LAYOUT_OPTIONS, changed_option, option_names, resolve_group
from floragrad.torch.param_info import (
    ParamInfo,
    distribute_state,
    ensure_state,
    new_infos,
    next_tensor_id,
    replacement_info,
    with_saved_ids,
)


def is_in_sync(infos: Mapping[Tensor, ParamInfo], groups: Sequence[Group]) -> bool:
    """Return whether every parameter is still in its place, and in its group."""
    listed = [(param, group) for group in groups for param in group["params"]]
    return len(listed) == len(infos) and all(
        param is known and group is info.group
        for (param, group), (known, info) in zip(listed, infos.items(), strict=True)
    )


def sync_infos(
    states: MutableMapping[Tensor, State], infos: Mapping[Tensor, ParamInfo], groups: Sequence[Group], defaults: Group
) -> dict[Tensor, ParamInfo]:
    """Return the infos of the groups' current parameters; move, add and drop their states.

    Args:
        states: Of the optimizer, changed in place.
        infos: Infos of the former parameters.
        groups: Options that are missing are filled in, as ``add_param_group`` does.
        defaults: Of the optimizer.

    Raises:
        ValueError: A new parameter cannot be updated, one stands in the groups twice, or an option was changed.
        RuntimeError: A flat vector replaced the matrices.
    """
    current = current_infos(infos, groups, defaults)
    check_options_unchanged(current)
    for param, old in replaced_params(infos, current).items():
        state = states.pop(old, {})
        if state and state["step"] > 0:
            exact = restore_state(state, param.device, current[param].plan)
            states[param] = state | distribute_state(param, current[param], exact)
    for param in infos:
        if param not in current:
            states.pop(param, None)
    numbered = with_saved_ids(current, states)
    for param, info in numbered.items():
        if param.requires_grad:
            ensure_state(param, info, states[param])
    return numbered


def current_infos(
    infos: Mapping[Tensor, ParamInfo], groups: Sequence[Group], defaults: Group
) -> dict[Tensor, ParamInfo]:
    """Return the infos of the groups' current parameters.

    Args:
        infos: Infos of the former parameters.
        groups: Options that are missing are filled in, as ``add_param_group`` does.
        defaults: Of the optimizer.

    Raises:
        ValueError: A new parameter cannot be updated, or one stands in the groups twice.
        RuntimeError: A flat vector replaced the matrices.
    """
    predecessors = _resharded(infos, groups)
    current: dict[Tensor, ParamInfo] = {}
    for group in groups:
        if not group.keys() >= {*option_names()}:
            group.update(resolve_group(group, defaults))
        _check_not_flattened(infos, group)
        names = group.get("param_names") or ()
        is_named = len(names) == len(group["params"])
        for place, param in enumerate(group["params"]):
            if param in current:
                raise ValueError(f"{current[param].name} is in the parameter groups twice: list it once")
            if param in infos:
                current[param] = replace(infos[param], group=group)
            elif param in predecessors:
                current[param] = replacement_info(infos[predecessors[param]], group, param)
            else:
                number = max(next_tensor_id(infos), next_tensor_id(current))
                name = names[place] if is_named else f"parameter {number}"
                current |= new_infos({param: name}, group, number)
    return current


def replaced_params(infos: Mapping[Tensor, ParamInfo], current: Mapping[Tensor, ParamInfo]) -> dict[Tensor, Tensor]:
    """Return the former parameter of each new one that has its id."""
    gone = {info.tensor_id: param for param, info in infos.items() if param not in current}
    return {
        param: gone[info.tensor_id] for param, info in current.items() if param not in infos and info.tensor_id in gone
    }


def check_options_unchanged(infos: Mapping[Tensor, ParamInfo]) -> None:
    """Refuse an option that was changed while the state depends on it.

    Raises:
        ValueError: Naming the option, both values and the remedy.
    """
    seen: set[tuple[int, int]] = set()
    for info in infos.values():
        pair = id(info.layout_options), id(info.group)
        if pair not in seen:
            seen.add(pair)
            check_option_unchanged(info)


def check_option_unchanged(info: ParamInfo) -> None:
    """Refuse a changed option of one parameter; see :func:`check_options_unchanged`."""
    option = changed_option(info.layout_options, info.group)
    if option:
        before = info.layout_options[option]
        raise ValueError(
            f"{option} of the group of {info.name} was changed from {before!r} to {info.group[option]!r} while its "
            f"state depends on it: {LAYOUT_OPTIONS[option]}; set it back to {before!r}, or construct a new Flora with "
            "it and load new.convert_state(old.state_dict()) into that"
        )


def _resharded(infos: Mapping[Tensor, ParamInfo], groups: Sequence[Group]) -> dict[Tensor, Tensor]:
    """Return the former parameter of each new one that is its shard, or of which it was a shard.

    Accelerate's FSDP2 replaces the parameters of an optimizer by their shards.
    """
    params = [param for group in groups for param in group["params"]]
    if [param.shape for param in params] != [param.shape for param in infos]:
        return {}
    present = set(params)
    return {
        param: old
        for param, old in zip(params, infos, strict=True)
        if old not in present and param not in infos and is_sharded(param) != is_sharded(old)
    }


def _check_not_flattened(infos: Mapping[Tensor, ParamInfo], group: Group) -> None:
    if len(group["params"]) != 1:
        return
    present = set(group["params"])
    gone = [param for param, info in infos.items() if info.group is group and param not in present]
    check_not_flattened([param for param in group["params"] if param not in infos], gone)
