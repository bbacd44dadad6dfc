"""Which tensors the native kernels step, and how they are handed over."""

from math import sqrt
from typing import Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from floragrad.policy import Momentum
from floragrad.torch.learnt import POWER_ITERATIONS, noisy
from floragrad.torch.native.layout import lies_plainly, obstacle_of, unsuited
from floragrad.torch.native.library import DTYPES, STATE_DTYPES, Library, Step, library
from floragrad.torch.projection import normalise_buckets
from floragrad.torch.tensor_step import State, TensorStep

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
    return suits(param, grad, at) and all(map(lies_plainly, state.values()))


def suits(param: Tensor, grad: Tensor, at: TensorStep) -> bool:
    """Whether they can, as long as the state lies where the parameter does."""
    return (
        library() is not None
        and not unsuited(at.plan, at.group)
        and not obstacle_of(param)
        and not obstacle_of(grad)
        and grad.dtype == param.dtype
    )


def step_native(param: Tensor, grad: Tensor, state: State, at: TensorStep) -> None:
    """Update one parameter and its state in place, as ``step.step_tensor`` does; :func:`can_step` holds."""
    kernels = library()
    assert kernels is not None
    given = _described(param, at, kernels)
    scratch = torch.empty(kernels.step_bytes(given), dtype=torch.uint8)
    previous = state["projection_weight"].clone() if given.learnt and given.opens_epoch else None
    if isinstance(param, FakeTensor):
        return  # what there would be to hold has been held
    _point(given, param, grad, state, scratch, previous)
    given.size = _step_size(param, at)
    given.keep = 1 - given.size * at.group["weight_decay"]
    kernels.statistics(given)
    if previous is not None:
        _learn(given, kernels, state["projection_weight"], previous, at)
    kernels.update(given)
    torch.autograd.graph.increment_version(param)


def _described(param: Tensor, at: TensorStep, kernels: Library) -> Step:
    """What the kernels need to know, but for where the tensors are."""
    plan, group = at.plan, at.group
    # A tensor without a matrix view is one row.
    shape = (plan.view.batch, plan.view.rows, plan.view.columns) if plan.view else (1, 1, param.numel())
    batch, rows, columns = shape
    learnt = plan.momentum == "sketch" and plan.projection == "adaptive"
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
        learnt=learnt,
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
        clip_threshold=group["clip_threshold"],
        parallel=kernels.parallel,
        thread_number=kernels.thread_number,
        threads=torch.get_num_threads(),
    )


def _point(given: Step, param: Tensor, grad: Tensor, state: State, scratch: Tensor, previous: Tensor | None) -> None:
    """Where the tensors are."""
    given.param, given.grad, given.scratch = param.data_ptr(), grad.data_ptr(), scratch.data_ptr()
    for field, key in _KEYS.items():
        if key in state:
            setattr(given, field, state[key].data_ptr())
    if previous is not None:
        given.previous = previous.data_ptr()


def _step_size(param: Tensor, at: TensorStep) -> float:
    """α."""
    if not at.group["scale_parameter"]:
        return float(at.lr)
    norm = float(torch.linalg.vector_norm(param, dtype=torch.float32))
    return float(at.lr) * max(float(at.group["eps"][1]), norm / sqrt(param.numel()))


def _learn(given: Step, kernels: Library, weight: Tensor, previous: Tensor, at: TensorStep) -> None:
    """Power iterations on β₁ decode(M) + (1 − β₁) U, from the old weights plus a little noise."""
    learnt = noisy(previous, at)
    for _ in range(POWER_ITERATIONS):
        grown = torch.empty_like(learnt)
        kernels.grow(given, learnt.data_ptr(), grown.data_ptr())
        learnt = normalise_buckets(grown, at.plan.width, learnt)
    weight.copy_(learnt)
