"""CPU backend: the passes of a step in C++ kernels."""

from collections.abc import Iterator, Sequence
from math import sqrt
from typing import Final

import torch
from torch import Tensor

from floragrad.policy import Momentum, TensorPlan
from floragrad.torch import update as pure
from floragrad.torch.adaptive import learn_weights
from floragrad.torch.backends.cpu.library import (
    DTYPES,
    STATE_DTYPES,
    Library,
    Step,
    absence,
    library,
    unsupported_tensor,
)
from floragrad.torch.context import ParamUpdate, StepContext
from floragrad.torch.part import Part, Passes, ShardSum
from floragrad.torch.scheduling import step_size
from floragrad.torch.validation import increment_versions, is_plain

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


def name() -> str:
    """Return the backend's name with the instruction set of its kernels."""
    kernels = library()
    return "native" if kernels is None else f"native ({kernels.name})"


def unsupported_reason(tensor: Tensor, plan: TensorPlan, part: Part) -> str:
    """Return why the kernels do not support a parameter; empty if they do."""
    if library() is None:
        return absence()
    if plan.momentum == "sketch" and plan.projection == "gaussian":
        return "Gaussian projection"
    if plan.second_moment_dtype != "float32":
        return f"second moment in {plan.second_moment_dtype}"
    return part.irregularity or unsupported_tensor(tensor)


def supports(update: ParamUpdate) -> bool:
    """Return whether the kernels support the memory layout of this step's tensors."""
    param, grad, state, ctx = update
    return (
        not unsupported_reason(param, ctx.plan, ctx.part)
        and not unsupported_tensor(grad)
        and grad.dtype == param.dtype
        and param.numel() > 0
        and all(is_plain(value) and value.is_cpu for value in state.values())
    )


def passes(updates: Sequence[ParamUpdate]) -> Iterator[Passes]:
    """Yield the passes of whole tensors, shards, and tensors that learn weights; :func:`supports` is true for each.

    All share one scratch buffer: a pass leaves nothing there for the next.
    """
    kernels = library()
    if kernels is None or not updates:
        return
    steps = [_described(update.param.dtype, update.ctx, kernels, **_addresses(update)) for update in updates]
    scratch = torch.empty(max(map(kernels.scratch_bytes, steps)), dtype=torch.uint8, device="cpu")
    pairs = list(zip(updates, steps, strict=True))
    learning = [pair for pair in pairs if pair[0].ctx.learns_weights]
    others = [pair for pair in pairs if not pair[0].ctx.learns_weights]
    for pair in learning:
        yield _interleaved([pair], scratch, kernels)
    if whole := [pair for pair in others if not pair[0].ctx.part.split]:
        yield _consecutive(whole, scratch, kernels)
    if shards := [pair for pair in others if pair[0].ctx.part.split]:
        yield _interleaved(shards, scratch, kernels)


def temporary_bytes(steps: Sequence[tuple[torch.dtype, StepContext]]) -> int:
    """Return the bytes that :func:`passes` holds beside gradients and state for whole tensors with drawn signs.

    Args:
        steps: Dtype and context of each parameter.
    """
    kernels = library()
    if kernels is None or not steps:
        return 0
    given = [_described(dtype, ctx, kernels) for dtype, ctx in steps]
    return max(map(kernels.scratch_bytes, given)) + max(map(kernels.kept_bytes, given))


def _consecutive(pairs: Sequence[tuple[ParamUpdate, Step]], scratch: Tensor, kernels: Library) -> Passes:
    """Run all passes of a whole tensor, then those of the next: a tensor stays in the cache, and Python out of it."""
    updates, steps = zip(*pairs, strict=True)
    kept = torch.empty(max(map(kernels.kept_bytes, steps)), dtype=torch.uint8, device="cpu")
    for step, update in zip(steps, updates, strict=True):
        step.kept, step.scratch = kept.data_ptr(), scratch.data_ptr()
        _set_sizes(step, update, _square_norm(update))
    kernels.all_passes((Step * len(steps))(*steps), len(steps))
    increment_versions(update.param for update in updates)
    yield from ()


def _interleaved(pairs: Sequence[tuple[ParamUpdate, Step]], scratch: Tensor, kernels: Library) -> Passes:
    """Run each pass over all tensors; one that learns weights comes alone."""
    updates, steps = zip(*pairs, strict=True)
    sizes = list(map(kernels.kept_bytes, steps))
    kept = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
    given = (Step * len(steps))(*steps)
    first, shares = 0, []
    for each, update, size in zip(given, updates, sizes, strict=True):
        each.kept, each.scratch = kept.data_ptr() + first, scratch.data_ptr()
        if update.ctx.part.split:
            shares.append(_shares(update.ctx, kept[first : first + size]))
        first += size
    norms = list(map(_square_norm, updates))
    kernels.statistics(given, len(given))
    norm_shares = [each.ctx.shard_sum(norm) for each, norm in zip(updates, norms, strict=True) if norm is not None]
    yield norm_shares + [share for statistics, _ in shares for share in statistics]
    kernels.normalise(given, len(given))
    if updates[0].ctx.learns_weights:
        previous = updates[0].state["projection_weight"].clone()  # read by the kernels until the end of the step
        given[0].previous = previous.data_ptr()

        def power_products(learner: Tensor) -> Tensor:
            product = torch.empty_like(learner)
            kernels.power_iteration(given[0], learner.data_ptr(), product.data_ptr())
            return product

        ctx = updates[0].ctx
        yield from learn_weights(ctx, ctx.adaptive_weight(updates[0].state), power_products)
    kernels.direction(given, len(given))
    yield [square for _, square in shares]
    for each, update, norm in zip(given, updates, norms, strict=True):
        _set_sizes(each, update, norm)
    kernels.apply(given, len(given))
    increment_versions(update.param for update in updates)


def _square_norm(update: ParamUpdate) -> Tensor | None:
    """Return ‖W‖² of the local part, where the step is in its units."""
    return pure.square_norm(update.param) if update.ctx.group["scale_parameter"] else None


def _set_sizes(step: Step, update: ParamUpdate, square_norm: Tensor | None) -> None:
    """Set the factors of the parameter and of its update, from ‖W‖² of the whole tensor."""
    ctx = update.ctx
    alpha = step_size(ctx.group, ctx.step, 0.0 if square_norm is None else sqrt(float(square_norm) / ctx.numel))
    step.keep, step.size = 1 - alpha * ctx.group["weight_decay"], alpha * ctx.sign


def _shares(ctx: StepContext, kept: Tensor) -> tuple[list[ShardSum], ShardSum]:
    """Return views of a shard's shares of the statistics and of ‖D‖², which the kernels write."""
    if not ctx.plan.factored:
        return [], ctx.shard_sum(kept[:4].view(torch.float32))
    batch, _, columns = ctx.view
    sizes = [batch * columns, batch, 1]
    column_sums, row_totals, square = torch.split(kept[: 4 * sum(sizes)].view(torch.float32), sizes)
    statistics = [ctx.shard_sum(column_sums, ("rows",)), ctx.shard_sum(row_totals, ("rows", "columns"))]
    return statistics, ctx.shard_sum(square)


def _described(dtype: torch.dtype, ctx: StepContext, kernels: Library, **addresses: int) -> Step:
    """Return the kernels' arguments but for scratch and step size."""
    plan, group, part = ctx.plan, ctx.group, ctx.part
    # A tensor without a matrix view is one row.
    batch, rows, columns = ctx.view if plan.view else (1, 1, ctx.view.numel)
    assert part.row_words is not None
    first, stride = part.row_words
    return Step(
        batch=batch,
        rows=rows,
        columns=columns,
        width=plan.width if plan.view else columns,
        value_dtype=DTYPES[dtype],
        state_dtype=STATE_DTYPES[ctx.state_dtype],
        momentum=_MOMENTA[plan.momentum],
        is_vector=plan.view is None,
        factored=plan.factored,
        adaptive=ctx.is_adaptive,
        stochastic=group["stochastic_rounding"],
        residual=group["residual"] or plan.momentum != "sketch",
        is_resample_step=ctx.is_resample_step or ctx.learns_weights,
        all_rows=plan.view.rows if plan.view else 1,
        all_elements=ctx.numel,
        all_row_words=part.row_count,
        first_row_word=first,
        matrix_row_words=stride,
        seed=group["seed"],
        tensor_id=ctx.tensor_id,
        step=ctx.step,
        resample_index=ctx.resample_index,
        beta1=group["beta1"] or 0.0,
        beta2=ctx.beta2,
        eps=group["eps"][0],
        clip_threshold=group["clip_threshold"],
        parallel=kernels.parallel,
        thread_number=kernels.thread_number,
        threads=torch.get_num_threads(),
        **addresses,
    )


def _addresses(update: ParamUpdate) -> dict[str, int]:
    found = {field: update.state[key].data_ptr() for field, key in _KEYS.items() if key in update.state}
    return {"param": update.param.data_ptr(), "grad": update.grad.data_ptr(), **found}
