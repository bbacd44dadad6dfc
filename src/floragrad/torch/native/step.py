"""Which tensors the native kernels step, and how they are handed over."""

from collections.abc import Sequence
from math import sqrt
from typing import Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from floragrad.policy import Momentum
from floragrad.torch.handover import is_plain
from floragrad.torch.learnt import POWER_ITERATIONS, noisy
from floragrad.torch.native.layout import obstacle_of, unsuited
from floragrad.torch.native.library import DTYPES, STATE_DTYPES, Library, Step, library
from floragrad.torch.projection import normalise_buckets
from floragrad.torch.scheduling import step_size
from floragrad.torch.tensor_step import State, TensorStep, TensorUpdate

_MOMENTA: Final[dict[Momentum, int]] = {"none": 0, "whole": 1, "sketch": 2}

_KEYS: Final = {
    "data": "exp_avg",
    "scale": "exp_avg_scale",
    "row_var": "row_var",
    "col_var": "col_var",
    "variance": "variance",
    "weight": "projection_weight",
}
"""Fields of the kernels' step, and the state that they point to."""


def can_step(param: Tensor, grad: Tensor, state: State, at: TensorStep) -> bool:
    """Whether the native kernels can make this step: all that they read and write lies as they expect."""
    return (
        library() is not None
        and not unsuited(at.plan)
        and not obstacle_of(param)
        and not obstacle_of(grad)
        and grad.dtype == param.dtype
        and all(is_plain(value) and value.is_cpu for value in state.values())
    )


def step_native(updates: Sequence[TensorUpdate]) -> None:
    """Update parameters and their states in place, as ``step.step_tensors`` does; :func:`can_step` holds for each."""
    kernels = library()
    assert kernels is not None
    at_once = [update for update in updates if not update.at.learns]
    if at_once:
        _step_at_once(at_once, kernels)
    for update in updates:
        if update.at.learns:
            _step_learning(update, kernels)


def _step_at_once(updates: Sequence[TensorUpdate], kernels: Library) -> None:
    """One after the other in the same room, in one call."""
    steps = (Step * len(updates))(*(_described(update, kernels) for update in updates))
    scratch = torch.empty(kernels.most_step_bytes(steps, len(steps)), dtype=torch.uint8, device="cpu")
    if any(isinstance(update.param, FakeTensor) for update in updates):
        return  # what there would be to hold has been held
    kernels.steps(steps, len(steps), scratch.data_ptr())
    _count_versions(updates)


def _described(update: TensorUpdate, kernels: Library) -> Step:
    """What the kernels need to know, but for the room that they work in, and where fake tensors would be."""
    param, at = update.param, update.at
    plan, group = at.plan, at.group
    # A tensor without a matrix view is one row.
    shape = (plan.view.batch, plan.view.rows, plan.view.columns) if plan.view else (1, 1, param.numel())
    batch, rows, columns = shape
    size = _step_size(param, at)
    return Step(
        batch=batch,
        rows=rows,
        columns=columns,
        width=plan.width if plan.view else columns,
        value_dtype=DTYPES[param.dtype],
        state_dtype=STATE_DTYPES[plan.state_dtype if plan.view else "float32"],
        momentum=_MOMENTA[plan.momentum],
        is_vector=plan.view is None,
        factored=plan.factored,
        learnt=at.is_learnt,
        stochastic=group["stochastic_rounding"],
        residual=group["residual"] or plan.momentum != "sketch",
        opens_epoch=at.opens_epoch or at.learns,
        seed=group["seed"],
        index=at.index,
        step=at.step,
        epoch=at.epoch,
        beta1=group["beta1"] or 0.0,
        beta2=at.beta2,
        eps=group["eps"][0],
        keep=1 - size * group["weight_decay"],
        size=size * at.sign,
        clip_threshold=group["clip_threshold"],
        parallel=kernels.parallel,
        thread_number=kernels.thread_number,
        threads=torch.get_num_threads(),
        **({} if isinstance(param, FakeTensor) else _addresses(update)),
    )


def _addresses(update: TensorUpdate) -> dict[str, int]:
    found = {field: update.state[key].data_ptr() for field, key in _KEYS.items() if key in update.state}
    return {"param": update.param.data_ptr(), "grad": update.grad.data_ptr(), **found}


def _step_size(param: Tensor, at: TensorStep) -> float:
    """α."""
    scaled = at.group["scale_parameter"]
    norm = float(torch.linalg.vector_norm(param, dtype=torch.float32)) if scaled else 0.0
    return step_size(at.group, at.step, norm / sqrt(param.numel()))


def _step_learning(update: TensorUpdate, kernels: Library) -> None:
    """A step that learns the projection's weights on its way."""
    weight, at = update.state["projection_weight"], update.at
    given = _described(update, kernels)
    scratch = torch.empty(kernels.most_step_bytes(given, 1), dtype=torch.uint8, device="cpu")
    previous = weight.clone()
    if isinstance(update.param, FakeTensor):
        return  # what there would be to hold has been held
    given.scratch, given.previous = scratch.data_ptr(), previous.data_ptr()
    kernels.statistics(given)
    # Power iterations on β₁ decode(M) + (1 − β₁) U, from the old weights plus a little noise.
    learnt = noisy(previous, at)
    for _ in range(POWER_ITERATIONS):
        grown = torch.empty_like(learnt)
        kernels.grow(given, learnt.data_ptr(), grown.data_ptr())
        learnt = normalise_buckets(grown, at.plan.width, learnt)
    weight.copy_(learnt)
    kernels.update(given)
    _count_versions([update])


def _count_versions(updates: Sequence[TensorUpdate]) -> None:
    """Let autograd see that parameters have changed; tensors of inference mode have no version."""
    torch.autograd.graph.increment_version([each.param for each in updates if not each.param.is_inference()])
