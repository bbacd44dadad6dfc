"""Runs :mod:`floragrad.reference` beside an optimizer: the same tensors, the same dense projections."""

import dataclasses
from typing import Any, Protocol

import numpy as np
import torch

from floragrad import Flora, reference
from floragrad.policy import TensorPlan
from floragrad.torch.adaptive import adaptive_noise
from floragrad.torch.context import StepContext
from floragrad.torch.options import plan_for, resolve_group
from floragrad.torch.param_info import initial_state
from floragrad.torch.part import Part
from tests.torch.cases import Case

INDEX = 0  # the only parameter of its optimizer
TOLERANCE = 1e-5


def trajectory(case: Case, gradients: list[torch.Tensor], **changes: Any) -> list[np.ndarray]:
    """The parameter after each step of the optimizer, in float64."""
    param = case.parameter()
    optimizer = Flora([param], **case.all_options(**changes))
    after = []
    for grad in gradients:
        param.grad = grad.clone()
        optimizer.step()
        after.append(param.detach().double().numpy().copy())
    return after


class Draws(Protocol):
    """What a framework draws for one tensor, as float64 NumPy."""

    def projection(self, plan: TensorPlan, resample_index: int) -> np.ndarray:
        """P, (k, n)."""
        ...

    def initial_weights(self, plan: TensorPlan) -> np.ndarray:
        """Of the adaptive projection, (batch, n)."""
        ...

    def noise(self, plan: TensorPlan, resample_index: int) -> np.ndarray:
        """What is added to the weights before they are learnt, (n,)."""
        ...


class TorchDraws:
    def __init__(self, group: dict[str, Any]) -> None:
        self.group = group

    def projection(self, plan: TensorPlan, resample_index: int) -> np.ndarray:
        return double(self._context(plan, 0).projection(resample_index).matrix())

    def initial_weights(self, plan: TensorPlan) -> np.ndarray:
        assert plan.view is not None
        state = initial_state(plan, self.group, INDEX, torch.device("cpu"))
        return double(state["projection_weight"]).reshape(-1, plan.view.columns)

    def noise(self, plan: TensorPlan, resample_index: int) -> np.ndarray:
        return double(adaptive_noise(self._context(plan, max(1, resample_index * self.group["kappa"]))))

    def _context(self, plan: TensorPlan, step: int) -> StepContext:
        return StepContext(plan, self.group, INDEX, step, torch.device("cpu"), Part.whole(plan.shape, plan.view))


def reference_trajectory(
    case: Case, gradients: list[torch.Tensor], dtype: torch.dtype = torch.float32, **changes: Any
) -> list[np.ndarray]:
    """The parameter after every step, float64, in the shape of its view; ``dtype`` is what it starts in."""
    group = resolve_group(case.all_options(**changes), _defaults())
    plan = plan_for(torch.Size(case.shape), group)
    view = plan.view or (1, 1, max(1, torch.Size(case.shape).numel()))
    param, *grads = (double(each).reshape(view) for each in (case.parameter(dtype), *gradients))
    return reference_course(plan, group, param, grads, TorchDraws(group))


def reference_course(
    plan: TensorPlan, group: dict[str, Any], param: np.ndarray, gradients: list[np.ndarray], draws: Draws
) -> list[np.ndarray]:
    """The parameter after every step: all of it in the shape of the plan's view, (batch, m, n)."""
    shared = {field.name for field in dataclasses.fields(reference.Options)} & group.keys()
    options = reference.Options(
        **{name: group[name] for name in shared - {"beta1"}},
        beta1=None if plan.momentum == "none" else group["beta1"],
        factored=plan.factored,
    )
    state = reference.State()
    adaptive = plan.momentum == "sketch" and plan.projection == "adaptive"
    weights = draws.initial_weights(plan) if adaptive else None
    before = now = None
    trajectory = []
    for grad in gradients:
        state.step += 1
        update = reference.second_moment(grad, state, options)
        if plan.momentum == "sketch":
            opens = state.step == 1 or state.step % group["kappa"] == 0
            resample_index = state.step // group["kappa"]
            if weights is not None:
                before = _stack(weights, plan.width) if now is None else now
                if opens:
                    blended = reference.blend(update, state, options, before)
                    start = weights + draws.noise(plan, resample_index)
                    learnt = map(reference.adaptive_weights, blended, start, [plan.width] * len(start))
                    weights = np.stack(list(learnt))
                    now = _stack(weights, plan.width)
            elif opens:
                before, now = now, draws.projection(plan, resample_index)
                before = now if before is None else before
            if not opens:
                before = now
        direction = reference.direction(update, state, options, now, before)
        param = reference.apply(param, direction, state, options)
        trajectory.append(param)
    return trajectory


def assert_same_course(case: Case, found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for step, (ours, oracle) in enumerate(zip(found, expected, strict=True), start=1):
        error = np.abs(ours.reshape(oracle.shape) - oracle).max() / np.abs(oracle).max()
        assert error < TOLERANCE, f"{case} leaves the oracle at step {step}: relative error {error:.2e}"


def _defaults() -> dict[str, Any]:
    from floragrad import Flora

    return dict(Flora([torch.nn.Parameter(torch.zeros(1))], lr=1.0).defaults)


def double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def _stack(weights: np.ndarray, k: int) -> np.ndarray:
    return np.stack([reference.bucket_projection(each, k) for each in weights])
