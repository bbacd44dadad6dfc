"""Groups changed after the optimizer was made: known tensors are kept, new ones adopted, missing ones dropped."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace

from torch import Tensor

from floragrad.torch.checkpoint import exact_state
from floragrad.torch.context import Group, State
from floragrad.torch.distributed.flat import refuse_flattened
from floragrad.torch.distributed.lockstep import is_sharded
from floragrad.torch.options import LAYOUT_OPTIONS, changed_option, option_names, resolve_group
from floragrad.torch.slots import (
    Slot,
    live_state,
    new_slots,
    next_number,
    numbered_slots,
    placed_slot,
    placed_state,
)


def is_settled(slots: Mapping[Tensor, Slot], groups: Sequence[Group]) -> bool:
    """Whether every parameter is still in its place, and in its group."""
    listed = [(param, group) for group in groups for param in group["params"]]
    return len(listed) == len(slots) and all(
        param is known and group is slot.group
        for (param, group), (known, slot) in zip(listed, slots.items(), strict=True)
    )


def follow(
    states: MutableMapping[Tensor, State], slots: Mapping[Tensor, Slot], groups: Sequence[Group], defaults: Group
) -> dict[Tensor, Slot]:
    """Return the slots of the parameters that the groups have now; states move along, appear and go.

    Args:
        states: Of the optimizer, changed in place.
        slots: Of the parameters that the groups had.
        groups: Options that are missing are filled in, as ``add_param_group`` does.
        defaults: Of the optimizer.

    Raises:
        ValueError: A new parameter cannot be updated, one stands in the groups twice, or an option was changed.
        RuntimeError: Matrices were exchanged for a flat vector.
    """
    followed = followed_slots(slots, groups, defaults)
    refuse_changed_options(followed)
    for param, old in predecessors_of(slots, followed).items():
        state = states.pop(old, {})
        if state and state["step"] > 0:
            exact = exact_state(state, param.device, followed[param].plan)
            states[param] = state | placed_state(param, followed[param], exact)
    for param in slots:
        if param not in followed:
            states.pop(param, None)
    numbered = numbered_slots(followed, states)
    for param, slot in numbered.items():
        if param.requires_grad:
            live_state(param, slot, states[param])
    return numbered


def followed_slots(slots: Mapping[Tensor, Slot], groups: Sequence[Group], defaults: Group) -> dict[Tensor, Slot]:
    """The slots of the parameters that the groups have now.

    Args:
        slots: Of the parameters that they had.
        groups: Options that are missing are filled in, as ``add_param_group`` does.
        defaults: Of the optimizer.

    Raises:
        ValueError: A new parameter cannot be updated, or one stands in the groups twice.
        RuntimeError: Matrices were exchanged for a flat vector.
    """
    predecessors = _exchanged(slots, groups)
    followed: dict[Tensor, Slot] = {}
    for group in groups:
        if not group.keys() >= {*option_names()}:
            group.update(resolve_group(group, defaults))
        _refuse_flattened(slots, group)
        names = group.get("param_names") or ()
        is_named = len(names) == len(group["params"])
        for place, param in enumerate(group["params"]):
            if param in followed:
                raise ValueError(f"{followed[param].name} stands in the parameter groups twice: list it once")
            if param in slots:
                followed[param] = replace(slots[param], group=group)
            elif param in predecessors:
                followed[param] = placed_slot(slots[predecessors[param]], group, param)
            else:
                number = max(next_number(slots), next_number(followed))
                name = names[place] if is_named else f"parameter {number}"
                followed |= new_slots({param: name}, group, number)
    return followed


def predecessors_of(slots: Mapping[Tensor, Slot], followed: Mapping[Tensor, Slot]) -> dict[Tensor, Tensor]:
    """The parameters whose places new ones have taken, by their numbers."""
    gone = {slot.index: param for param, slot in slots.items() if param not in followed}
    return {param: gone[slot.index] for param, slot in followed.items() if param not in slots and slot.index in gone}


def refuse_changed_options(slots: Mapping[Tensor, Slot]) -> None:
    """Refuse an option that was changed while the state depends on it.

    Raises:
        ValueError: Naming the option, both values and the remedy.
    """
    seen: set[tuple[int, int]] = set()
    for slot in slots.values():
        pair = id(slot.written), id(slot.group)
        if pair not in seen:
            seen.add(pair)
            refuse_changed_option(slot)


def refuse_changed_option(slot: Slot) -> None:
    """As :func:`refuse_changed_options`, of one parameter."""
    option = changed_option(slot.written, slot.group)
    if option:
        before = slot.written[option]
        raise ValueError(
            f"{option} of the group of {slot.name} was changed from {before!r} to {slot.group[option]!r} while its "
            f"state depends on it: {LAYOUT_OPTIONS[option]}; set it back to {before!r}, or construct a new Flora with "
            "it and load new.convert_state(old.state_dict()) into that"
        )


def _exchanged(slots: Mapping[Tensor, Slot], groups: Sequence[Group]) -> dict[Tensor, Tensor]:
    """New parameters that are shards of old ones, or wholes of shards, in their places.

    Accelerate's FSDP2 exchanges the parameters of an optimizer for shards of them.
    """
    params = [param for group in groups for param in group["params"]]
    if [param.shape for param in params] != [param.shape for param in slots]:
        return {}
    present = set(params)
    return {
        param: old
        for param, old in zip(params, slots, strict=True)
        if old not in present and param not in slots and is_sharded(param) != is_sharded(old)
    }


def _refuse_flattened(slots: Mapping[Tensor, Slot], group: Group) -> None:
    if len(group["params"]) != 1:
        return
    present = set(group["params"])
    gone = [param for param, slot in slots.items() if slot.group is group and param not in present]
    refuse_flattened([param for param in group["params"] if param not in slots], gone)
