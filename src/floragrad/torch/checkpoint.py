"""Checks of a checkpoint before it is loaded, and the loading of its tensors."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from floragrad.policy import SCALAR_STATE, STATE_KEYS, TensorPlan
from floragrad.torch.distributed.collectives import is_sharded
from floragrad.torch.options import LAYOUT_OPTIONS, changed_option, with_added_options
from floragrad.torch.storage import repacked_int4

Group = dict[str, Any]
_MOMENTUM_STATE: Final = ("exp_avg", "exp_avg_scale", "projection_weight")


def saved_groups_with_device(saved: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """Return the packed groups; those with Gaussian projections record their kind of device."""
    return [
        {**packed, "device_type": device_types(group)} if group["projection"] == "gaussian" else packed
        for packed, group in zip(saved, groups, strict=True)
    ]


def check_loadable(
    state_dict: Mapping[str, Any], groups: Sequence[Group], plans: Mapping[Tensor, TensorPlan]
) -> dict[Tensor, Mapping[str, Any]]:
    """Return the saved state of each parameter; refuse a state that would be misread.

    Raises:
        ValueError: Naming the option or tensor that differs, both values and the remedy.
    """
    states: dict[Tensor, Mapping[str, Any]] = {}
    saved_groups = [with_added_options(saved) for saved in state_dict["param_groups"]]
    for number, saved in enumerate(saved_groups):
        check_written_by_flora(f"group {number} of the loaded state", saved)
    if [len(saved["params"]) for saved in saved_groups] != [len(group["params"]) for group in groups]:
        return states  # torch.optim refuses other numbers of groups or parameters
    for number, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        _check_options(number, saved, group)
        for key, param in zip(saved["params"], group["params"], strict=True):
            # A frozen parameter may have only entries of wrappers.
            if flora_state(state_dict["state"].get(key, {})):
                states[param] = state_dict["state"][key]
                check_tensors(key, states[param], plans[param])
    return states


def flora_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return Flora's entries of a parameter's state, without those of wrappers."""
    return {key: value for key, value in state.items() if key in STATE_KEYS}


def restore_state(saved: Mapping[str, Any], device: torch.device, plan: TensorPlan) -> dict[str, Any]:
    """Copy Flora's tensors to ``device`` (scalars to the CPU) in the dtypes of their plan.

    A state without ``tensor_id`` was written by version 0.1, and its int4 payload is packed anew.
    """
    dtypes = {key: getattr(torch, buffer.dtype) for key, buffer in plan.buffers.items()}
    with torch.inference_mode(False), torch.no_grad():
        copied = {
            key: _as_tensor(value, dtypes[key]).to("cpu" if key in SCALAR_STATE else device, dtypes[key], copy=True)
            for key, value in flora_state(saved).items()
        }
        if "tensor_id" not in copied and plan.state_dtype == "int4" and "exp_avg_scale" in copied:
            copied["exp_avg"] = _repacked(copied["exp_avg"], plan.width)
        return copied


def _repacked(payload: Tensor, width: int) -> Tensor:
    if not is_sharded(payload):
        return repacked_int4(payload, width)
    from floragrad.torch.distributed.shards import with_local

    return with_local(payload, repacked_int4(payload.to_local(), width))


def _as_tensor(value: Any, dtype: torch.dtype) -> Tensor:
    """Return a saved value as a tensor; numbers, from early optimizers of torch, exactly in ``dtype``."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device="cpu")


def _check_options(number: int, saved: Group, group: Group) -> None:
    where = f"group {number} of the loaded state"
    option = changed_option(saved, group)
    if option:
        remedy = "give that group" if option == "kind" else "build Flora with"
        raise ValueError(
            f"{where} was written with {option}={saved[option]!r}, this optimizer has "
            f"{option}={group[option]!r}: {LAYOUT_OPTIONS[option]}; {remedy} {option}={saved[option]!r}, "
            "or load optimizer.convert_state(state_dict), which encodes the momentum anew"
        )
    if "device_type" in saved and saved["device_type"] != device_types(group):
        raise ValueError(
            f"{where} has Gaussian projections drawn on {saved['device_type']}, this optimizer's "
            f"parameters are on {device_types(group)}, whose generator draws others; load it on the same "
            "kind of device, or train with projection='sign', which is the same on all"
        )


def check_written_by_flora(where: str, saved: Group) -> None:
    """Refuse the state of another optimizer.

    Raises:
        ValueError: Naming an option that is missing.
    """
    for option in LAYOUT_OPTIONS:
        if option not in saved:
            raise ValueError(
                f"{where} has no {option!r}: it was not written by Flora, and other optimizers' states "
                "cannot be converted; start with a fresh state"
            )


def lacks_momentum(saved: Mapping[str, Any], plan: TensorPlan) -> bool:
    """Return whether a state lacks only the plan's momentum: earlier versions took the tensor for an embedding."""
    expected = {name: buffer.shape for name, buffer in plan.buffers.items()}
    without_momentum = {name: shape for name, shape in expected.items() if name not in _MOMENTUM_STATE}
    return _shapes(saved) == without_momentum != expected


def _shapes(saved: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    # States of earlier releases have no id: it is the position.
    return {"tensor_id": ()} | {name: tuple(getattr(value, "shape", ())) for name, value in flora_state(saved).items()}


def check_tensors(key: int, saved: Mapping[str, Any], plan: TensorPlan) -> None:
    """Refuse the state of another tensor, and one whose low-bit storage was cast.

    Raises:
        ValueError: Naming the parameter, its saved shapes and those of the plan.
    """
    expected, found = {name: buffer.shape for name, buffer in plan.buffers.items()}, _shapes(saved)
    if lacks_momentum(saved, plan):
        raise ValueError(
            f"the loaded state of parameter {key} has no momentum, this optimizer's parameter of shape {plan.shape} "
            "keeps one: earlier versions took tensors more than four times as long as wide for embeddings, which keep "
            "none; load optimizer.convert_state(state_dict), which begins it anew"
        )
    if found != expected:
        raise ValueError(
            f"the loaded state of parameter {key} has {found}, this optimizer's parameter of shape "
            f"{plan.shape} needs {expected}: it belongs to another model"
        )
    for name, buffer in plan.buffers.items():
        if name not in SCALAR_STATE:
            what = f"{name!r} in the loaded state of parameter {key}"
            _check_dtype(what, saved[name].dtype, getattr(torch, buffer.dtype))


def _check_dtype(what: str, found: torch.dtype, planned: torch.dtype) -> None:
    """Refuse a cast of low-bit integers; floating-point tensors are cast back."""
    if found != planned and not (found.is_floating_point and planned.is_floating_point):
        raise ValueError(
            f"{what} is {found}, this optimizer keeps {planned}, to which it cannot be converted: "
            "load the state as it was saved, without casting its tensors"
        )


def device_types(group: Group) -> str:
    """Return the kinds of device of a group's parameters."""
    return ",".join(sorted({param.device.type for param in group["params"]}))
