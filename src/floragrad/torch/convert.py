"""Conversion of a saved state to other options: the momentum is decoded and encoded again."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from floragrad._streams import Stream
from floragrad.policy import STATE_KEYS, MatrixView, TensorPlan
from floragrad.torch.checkpoint import (
    check_tensors,
    check_written_by_flora,
    device_types,
    flora_state,
    lacks_momentum,
    restore_state,
)
from floragrad.torch.context import Group, State, StepContext
from floragrad.torch.distributed.collectives import is_sharded
from floragrad.torch.options import changed_option, layout_options, plan_for, with_added_options
from floragrad.torch.param_info import ParamInfo, initial_state
from floragrad.torch.part import Part
from floragrad.torch.projection import BucketProjection, Projection
from floragrad.torch.storage import dequantize_squares, load, quantize_squares_, save

_ALL = (slice(None), slice(None))


def converted_state(
    state_dict: Mapping[str, Any], groups: Sequence[Group], infos: Mapping[Tensor, ParamInfo]
) -> dict[str, Any]:
    """Return a state dictionary in the layout of an optimizer; the given one is unchanged.

    Args:
        state_dict: Of another Flora over the same parameters.
        groups: Of the optimizer that is to load it.
        infos: Its parameters.

    Raises:
        ValueError: It is not Flora's, has other numbers of groups or parameters, or tensors of other shapes.
    """
    found = [len(group["params"]) for group in state_dict["param_groups"]]
    expected = [len(group["params"]) for group in groups]
    if found != expected:
        raise ValueError(
            f"the state has groups of {found} parameters, this optimizer of {expected}: convert the state of an "
            "optimizer over the same parameters"
        )
    states, saved_groups, anew = dict(state_dict["state"]), [], []
    position = 0
    given_groups = map(with_added_options, state_dict["param_groups"])
    for number, (saved, group) in enumerate(zip(given_groups, groups, strict=True)):
        check_written_by_flora(f"group {number} of the state", saved)
        option = changed_option(saved, group)
        for key, param in zip(saved["params"], group["params"], strict=True):
            state, plan = flora_state(states.get(key, {})), plan_for(param.shape, saved)
            if state and (option or lacks_momentum(state, plan)):
                if not lacks_momentum(state, plan):
                    check_tensors(key, state, plan)
                conversion = _Conversion(saved, group, infos[param], state, plan, position, param.device)
                states[key] = states[key] | conversion.state()
                states[key] = {name: each for name, each in states[key].items() if conversion.keeps(name)}
                anew += conversion.losses
            position += 1
        saved_groups.append(_converted_group(saved, group) if option else saved)
    if anew:
        more = f", and {len(anew) - 5} more" if len(anew) > 5 else ""
        warnings.warn(f"the momentum starts anew for {', '.join(anew[:5])}{more}", UserWarning, stacklevel=3)
    return {**state_dict, "state": states, "param_groups": saved_groups}


def _converted_group(saved: Group, group: Group) -> Group:
    """Return the saved options with the layout options of a group."""
    layout = layout_options(group)
    if bool(saved["beta1"]) == bool(group["beta1"]):
        del layout["beta1"]
    kept = {name: value for name, value in saved.items() if name != "device_type"}
    device = {"device_type": device_types(group)} if group["projection"] == "gaussian" else {}
    return {**kept, **layout, **device}


class _Conversion:
    """Conversion of one tensor's state between two plans.

    Attributes:
        losses: Names of tensors whose momentum starts anew, with the reason.
    """

    def __init__(
        self,
        saved: Group,
        group: Group,
        info: ParamInfo,
        state: Mapping[str, Any],
        plan: TensorPlan,
        position: int,
        device: torch.device,
    ) -> None:
        self.losses: list[str] = []
        self._name, self._new_plan, self._old_plan = info.name, info.plan, plan
        device = torch.device("cpu") if device.type == "meta" else device
        whole = {key: each.full_tensor() if is_sharded(each) else each for key, each in state.items()}
        self._old: State = restore_state(whole, device, self._old_plan)
        number, step = int(self._old.get("tensor_id", position)), int(self._old["step"])
        self._new: State = initial_state(info.plan, group, number, device)
        self._new["step"].fill_(step)
        self._written, self._wanted = (
            StepContext(each, options, number, step, device, Part.whole(each.shape, each.view))
            for each, options in ((plan, saved), (info.plan, group))
        )
        self._elsewhere = saved.get("device_type", device.type) != device.type

    def keeps(self, key: str) -> bool:
        """Return whether the converted state keeps an entry: its own, or one of a wrapper."""
        return key in self._new or key not in STATE_KEYS

    def state(self) -> State:
        """Return the converted entries; initial ones for a tensor that was never stepped."""
        if self._new["step"] > 0:
            self._convert_second_moment()
            loss = self._convert_momentum() if self._new_plan.momentum != "none" else ""
            if loss:
                self.losses.append(f"{self._name} ({loss})")
        return self._new

    def _convert_second_moment(self) -> None:
        old, new = self._old_plan, self._new_plan
        if (old.view, old.factored, old.second_moment_dtype) == (new.view, new.factored, new.second_moment_dtype):
            for key in self._new.keys() & {"row_var", "col_var", "variance", "variance_scale"}:
                self._new[key].copy_(self._old[key])
            return
        variance = self._variance()
        if "variance_scale" in self._new:
            source, view = self._wanted.stream(Stream.VARIANCE_ROUNDING), self._wanted.view
            bits = self._wanted.part.draw_rounding(source, view.columns, slice(None), self._wanted.device)
            values = variance.reshape(view).clone()
            kept = quantize_squares_(values, bits.integers())
            for buffer, value in zip(self._wanted.variances(self._new), kept, strict=True):
                buffer.copy_(value)
            return
        if not new.factored or new.view is None:
            self._new["variance"].copy_(variance.reshape(new.shape))
            return
        variance = variance.reshape(new.view)
        self._new["row_var"].copy_(variance.mean(-1).view(self._new["row_var"].shape))
        self._new["col_var"].copy_(variance.mean(-2).view(self._new["col_var"].shape))

    def _variance(self) -> Tensor:
        """Return the second moment of every element; of a factored one row · column / mean(row)."""
        view = self._old_plan.view
        if "variance_scale" in self._old:
            return dequantize_squares(*self._written.variances(self._old))
        if not self._old_plan.factored or view is None:
            return self._old["variance"]
        rows, columns = (self._old[key].view(view.batch, *shape) for key, shape in _factors(view))
        return rows / rows.mean(-2, keepdim=True) * columns

    def _convert_momentum(self) -> str:
        """Encode the momentum; return the reason if that is impossible, else an empty string."""
        old, new = self._old_plan, self._new_plan
        if lacks_momentum(self._old, old) or old.momentum == "none":
            return "none was saved"
        if self._same_basis():
            rows = self._rows()
            if self._wanted.is_adaptive:
                self._new["projection_weight"].copy_(self._old["projection_weight"])
        else:
            dense = self._dense()
            if isinstance(dense, str):
                return dense
            rows = dense.reshape(self._wanted.view)
            if new.momentum == "sketch":
                rows = _projection(self._wanted, self._new).encode(rows)
        stored = self._wanted.stored(self._new)
        bits = None
        if stored.dtype != "float32":
            source = self._wanted.stream(Stream.CONVERSION_ROUNDING)
            bits = self._wanted.part.draw_rounding(source, new.width, slice(None), self._wanted.device)
        stored.write(_ALL, save(rows, stored.dtype, bits))
        return ""

    def _rows(self) -> Tensor:
        """Return the saved momentum in float32."""
        stored = self._written.stored(self._old)
        return load(stored.read(_ALL), stored.dtype, stored.width)

    def _dense(self) -> Tensor | str:
        """Return the momentum of every element, or the reason why it cannot be decoded."""
        rows, view = self._rows(), self._old_plan.view
        if self._old_plan.momentum == "whole" or view is None:
            return rows
        unbiased = self._new_plan.momentum == "sketch" and not self._wanted.group["residual"]
        projection = _projection(self._written, self._old)
        if not isinstance(projection, BucketProjection) and (self._elsewhere or not unbiased):
            return "Gaussian projections have no orthogonal decoder, and belong to a kind of device"
        decode = projection.add_decoded_ if unbiased else projection.add_orthogonal_
        return decode(rows.new_zeros(view), rows)

    def _same_basis(self) -> bool:
        """Return whether the momentum keeps its values, in any storage format."""
        old, new = self._old_plan, self._new_plan
        if old.view != new.view:
            return False
        if old.momentum == new.momentum == "whole":
            return True
        drawn = ("seed", "kappa") if new.projection != "adaptive" else ()
        before, now = self._written.group, self._wanted.group
        return (
            old.momentum == new.momentum
            and (old.projection, old.width) == (new.projection, new.width)
            and all(before[name] == now[name] for name in drawn)
            and not (old.projection == "gaussian" and self._elsewhere)
        )


def _factors(view: MatrixView) -> tuple[tuple[str, tuple[int, int]], tuple[str, tuple[int, int]]]:
    """Return the keys of a factored second moment with their shapes."""
    return ("row_var", (view.rows, 1)), ("col_var", (1, view.columns))


def _projection(ctx: StepContext, state: State) -> Projection:
    """Return the projection of the momentum at the end of a step."""
    if ctx.is_adaptive:
        return BucketProjection.normalised(ctx.adaptive_weight(state), ctx.plan.width)
    return ctx.projection(ctx.resample_index)
