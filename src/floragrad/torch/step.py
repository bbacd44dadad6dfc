"""One step of one tensor: the pure update run over blocks of rows, between the state's buffers.

The second moment needs all rows before any can be normalised, and the clipping threshold the size of the whole
update before any of it can be applied, so a step is several passes over blocks: statistics; sketches and what they
add, from which the update's norm follows; the update.

Where a tensor is sharded, sums are all that its parts need of each other. The step is a generator that hands them
out between its passes: whoever runs it has them added up, for all tensors together.
"""

from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from floragrad._streams import Stream
from floragrad.policy import SCALAR_STATE, Buffer, TensorPlan
from floragrad.torch import update as pure
from floragrad.torch.learnt import POWER_ITERATIONS, grown, noisy
from floragrad.torch.part import EVERYWHERE, ShardSum
from floragrad.torch.passes import UpdatePasses, of_batch, room_for, scales_of
from floragrad.torch.projection import (
    BucketProjection,
    Projection,
    normalise_buckets,
    random_signs,
)
from floragrad.torch.storage import StoredRows
from floragrad.torch.tensor_step import Group, State, TensorStep, TensorUpdate


@torch.inference_mode(False)
def initial_state(
    plan: TensorPlan, group: Group, index: int, device: torch.device, buffers: Mapping[str, Buffer] | None = None
) -> State:
    """Every buffer: zeros, and for ``"adaptive"`` random signs over their bucket's norm.

    Args:
        plan: Of the tensor.
        group: Its options.
        index: The number that its random streams are drawn with.
        device: Where the buffers are allocated.
        buffers: What of the plan's buffers is here; None: all of them.
    """
    state = {
        key: torch.zeros(buffer.shape, dtype=getattr(torch, buffer.dtype), device=device)
        for key, buffer in (plan.buffers if buffers is None else buffers).items()
    }
    # Among fake tensors only what was made of a number knows its value, and every step reads these.
    for key, value in zip(SCALAR_STATE, (0, index), strict=True):
        state[key] = torch.tensor(value, dtype=torch.int64, device="cpu")
    if "projection_weight" in state and device.type != "meta":
        weight = state["projection_weight"]
        signs = random_signs(weight.shape[-1], group["seed"], index, 0, Stream.MOMENTUM).expand_as(weight)
        weight.copy_(normalise_buckets(signs, plan.width, signs))
    return state


def step_tensors(updates: Sequence[TensorUpdate]) -> None:
    """Update parameters and their states in place by PyTorch's code; all of each is here."""
    for update in updates:
        for _ in step_part(*update):
            pass


def step_part(param: Tensor, grad: Tensor, state: State, at: TensorStep) -> Generator[list[ShardSum], None, None]:
    """Update what is here of one parameter and its state in place.

    Args:
        param: W, of the part's shape.
        grad: G, likewise; any floating dtype.
        state: The part's buffers.
        at: The tensor, its options and the step.

    Yields:
        Sums that have to be over all parts of the tensor when the generator goes on.
    """
    grads = grad.reshape(at.view)
    norm = pure.square_norm(param) if at.group["scale_parameter"] else None
    scales = yield from _second_moment(grads, state, norm, at)
    stored = at.stored(state)
    projection, previous = _projections(state, at)
    by = None
    if at.learns:
        assert previous is not None
        weight = at.learnt_weight(state)  # the projection's
        weight.copy_((yield from _learnt_weight(grads, scales, stored, previous, noisy(weight, at), at)))
    if projection is not None:
        by = pure.Estimator(projection, previous, at.group["beta1"], at.group["residual"])
    work = UpdatePasses(grads, scales, stored, by, at)
    square = yield from work.direction_square()
    yield [ShardSum(square, EVERYWHERE)]
    work.move(param, square, _step_size(norm, at))


def _second_moment(
    grads: Tensor, state: State, norm: Tensor | None, at: TensorStep
) -> Generator[list[ShardSum], None, pure.Scales]:
    """Update the second moment; what every gradient is to be multiplied by."""
    eps1, beta2 = at.group["eps"][0], at.beta2
    sums = [] if norm is None else [ShardSum(norm, EVERYWHERE)]
    if not at.plan.factored:
        if sums:
            yield sums
        variance = state["variance"].view(at.view)
        for where in at.blocks():
            pure.average_(pure.saturate_(variance[where]), grads[where].float().square(), 1, beta2, eps1)
        return pure.Scales(None, variance)
    assert at.plan.view is not None
    _, all_rows, all_columns = at.plan.view
    batch, rows, columns = at.view
    row_sums = grads.new_empty((batch, rows, 1), dtype=torch.float32)
    col_sums = grads.new_zeros((batch, 1, columns), dtype=torch.float32)
    room = at.room()
    for where in at.blocks():
        grad = grads[where]
        pure.add_square_sums_(grad, row_sums[where], col_sums[where[0]], room_for(grad, room))
    row_var, col_var = state["row_var"].view(batch, rows, 1), state["col_var"].view(batch, 1, columns)
    # What the rows' sum will be, known before the rows are: so that one sum over parts is enough.
    row_total = row_var.sum(-2, keepdim=True).mul_(beta2 / at.part.column_parts)
    row_total.add_(row_sums.sum(-2, keepdim=True), alpha=(1 - beta2) / all_columns)
    sums += [ShardSum(col_sums, ("rows",)), ShardSum(row_sums, ("columns",)), ShardSum(row_total, ("rows", "columns"))]
    yield sums
    pure.average_(row_var, row_sums, all_columns, beta2, eps1)
    pure.average_(pure.saturate_(col_var), col_sums, all_rows, beta2, eps1)
    row_mean = row_total.div_(all_rows).add_((1 - beta2) * eps1)
    return pure.factored_scales(row_var, row_mean, col_var)


def _step_size(norm: Tensor | None, at: TensorStep) -> float | Tensor:
    """α; ``norm`` is ‖W‖² where the step is in its units."""
    if norm is None:
        return at.step_lr
    numel = torch.Size(at.plan.shape).numel()
    return pure.relative(norm, numel, at.group["eps"][1]) * at.step_lr


def _projections(state: State, at: TensorStep) -> tuple[Projection | None, Projection | None]:
    """P of this step, with the old weights where new ones are to be learnt; P of the step before where it differs."""
    if at.plan.momentum != "sketch":
        return None, None
    if not at.is_learnt:
        return at.projection(at.epoch), at.projection(at.epoch - 1) if at.opens_epoch else None
    weight = at.learnt_weight(state)
    previous = BucketProjection.normalised(weight.clone(), at.plan.width) if at.learns else None
    return BucketProjection.normalised(weight, at.plan.width), previous


def _learnt_weight(
    grads: Tensor, scales: pure.Scales, stored: StoredRows, previous: Projection, weight: Tensor, at: TensorStep
) -> Generator[list[ShardSum], None, Tensor]:
    """Power iterations on β₁ decode(M) + (1 − β₁) U, from ``weight`` on."""
    width, beta1 = at.plan.width, at.group["beta1"]
    for _ in range(POWER_ITERATIONS):
        learner, growth = BucketProjection.normalised(weight, width), torch.zeros_like(weight)
        for where in at.blocks():
            kept, here = stored.read(where), (of_batch(previous, where), of_batch(learner, where))
            growth[where[0]] += grown(grads[where], scales_of(scales, where), kept, stored.dtype, *here, beta1)
        yield [ShardSum(growth, ("rows",))]
        weight = normalise_buckets(growth, width, weight)
    return weight
