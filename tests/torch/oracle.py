"""Runs :mod:`floragrad.reference` beside an optimizer: the same tensors, the same dense projections."""

import dataclasses
from typing import Any

import numpy as np
import torch

from floragrad import reference
from floragrad.torch.options import plan_of, resolve_group
from floragrad.torch.tensor_step import TensorStep, adaptive_noise, initial_state
from tests.torch.cases import Case

INDEX = 0  # the only parameter of its optimizer


def reference_trajectory(case: Case, gradients: list[torch.Tensor], **changes: Any) -> list[np.ndarray]:
    """The parameter after every step, float64, in the shape of its view."""
    group = resolve_group(case.all_options(**changes), {**_defaults(), "compile": False})
    plan = plan_of(torch.Size(case.shape), group)
    view = plan.view or (1, 1, max(1, torch.Size(case.shape).numel()))
    shared = {field.name for field in dataclasses.fields(reference.Options)} & group.keys()
    options = reference.Options(
        **{name: group[name] for name in shared - {"beta1"}},
        beta1=None if plan.momentum == "none" else group["beta1"],
        factored=plan.factored,
    )
    state = reference.State()
    param = _double(case.parameter()).reshape(view)
    weights = _initial_weights(plan, group)
    before = now = None
    trajectory = []
    for grad in gradients:
        state.step += 1
        update = reference.second_moment(_double(grad).reshape(view), state, options)
        if plan.momentum == "sketch":
            opens = state.step == 1 or state.step % group["kappa"] == 0
            if plan.projection == "adaptive":
                before = _stack(weights, plan.width) if now is None else now
                if opens:
                    blended = reference.blend(update, state, options, before)
                    weights = _learn(weights, blended, plan.width, group, state.step)
                    now = _stack(weights, plan.width)
            elif opens:
                before, now = now, _drawn(plan, group, state.step)
                before = now if before is None else before
            if not opens:
                before = now
        direction = reference.direction(update, state, options, now, before)
        param = reference.apply(param, direction, state, options)
        trajectory.append(param)
    return trajectory


def _defaults() -> dict[str, Any]:
    from floragrad import Flora

    return dict(Flora([torch.nn.Parameter(torch.zeros(1))], lr=1.0).defaults)


def _double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def _drawn(plan: Any, group: dict[str, Any], step: int) -> np.ndarray:
    at = TensorStep(plan, group, INDEX, step, torch.device("cpu"))
    return _double(at.projection(at.epoch).matrix())


def _initial_weights(plan: Any, group: dict[str, Any]) -> np.ndarray | None:
    state = initial_state(plan, group, INDEX, torch.device("cpu"))
    if "projection_weight" not in state:
        return None
    return _double(state["projection_weight"]).reshape(-1, plan.view.columns)


def _stack(weights: np.ndarray, k: int) -> np.ndarray:
    return np.stack([reference.bucket_projection(each, k) for each in weights])


def _learn(weights: np.ndarray, blended: np.ndarray, k: int, group: dict[str, Any], step: int) -> np.ndarray:
    noise = _double(adaptive_noise(weights.shape[-1], k, group["seed"], INDEX, step // group["kappa"]))
    return np.stack([reference.adaptive_weights(m, w + noise, k) for m, w in zip(blended, weights, strict=True)])
