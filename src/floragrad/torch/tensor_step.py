"""One step of one tensor: the pure update run over blocks of rows, between the state's buffers.

The second moment needs all rows before any can be normalised, and the clipping threshold all directions
before any can be applied, so a step is three passes over blocks: statistics, direction, descent. Between the
last two D is held, one float32 buffer of the tensor's size; everything else is as large as a block.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, Final

import torch
from torch import Tensor

from floragrad._streams import ADAPTIVE_NOISE, Stream
from floragrad.policy import MatrixView, StateDtype, TensorPlan
from floragrad.torch import update as pure
from floragrad.torch.projection import (
    BucketProjection,
    Projection,
    draw_projection,
    normalise_buckets,
    philox,
    power_iteration,
    random_signs,
)
from floragrad.torch.quantize import random_bits, round_to_bfloat16
from floragrad.torch.storage import Block, StoredRows, load, row_blocks, save, seeded_generator

BLOCK_ELEMENTS: Final = 2**18
"""Elements of a block of rows on the CPU: 1 MiB of float32, so that a block's passes stay in cache."""
ACCELERATOR_BLOCK_ELEMENTS: Final = 2**24
"""The same elsewhere, where a launch costs more than a pass over memory."""
PIECES: Final = 4
"""Blocks that a tensor is cut into at least, so that what is as large as a block stays small beside it."""
WHOLE_ELEMENTS: Final = 2**14
"""A tensor of up to so many elements is one block: its temporaries take less than its launches."""

State = dict[str, Tensor]
Group = dict[str, Any]


def block_elements(elements: int, device: torch.device) -> int:
    """How many of a tensor's elements are worked on at a time: all of a small one's."""
    if elements <= WHOLE_ELEMENTS:
        return elements
    return min(BLOCK_ELEMENTS if device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS, elements // PIECES)


@dataclass(frozen=True)
class TensorStep:
    """One tensor at one step.

    Attributes:
        plan: What is kept for the tensor.
        group: The options of its parameter group.
        index: The tensor's position in the optimizer, for the random streams.
        step: t, from 1.
        device: Where the parameter is.
    """

    plan: TensorPlan
    group: Group
    index: int
    step: int
    device: torch.device

    @property
    def epoch(self) -> int:
        """⌊t/κ⌋: projections are redrawn where it changes."""
        return int(self.step // self.group["kappa"])

    @property
    def opens_epoch(self) -> bool:
        """Whether the projection of this step differs from that of the step before."""
        return self.step % int(self.group["kappa"]) == 0

    @property
    def view(self) -> MatrixView:
        """The tensor as (batch, rows, columns); one without a view is a single column."""
        return self.plan.view or MatrixView(1, torch.Size(self.plan.shape).numel(), 1)

    def blocks(self) -> Iterator[Block]:
        """Batches and rows of the view, a block at a time; the whole of it when compiled or small."""
        gaussian = self.plan.momentum == "sketch" and self.plan.projection == "gaussian"
        total = self.view.numel
        elements = total if self.group["compile"] else block_elements(total, self.device)
        return row_blocks(self.view, elements, gaussian=gaussian)

    def generator(self, stream: Stream) -> torch.Generator:
        """The device's generator, seeded for this tensor, step and use: nothing of it needs saving."""
        return seeded_generator(self.device, self.group["seed"], self.index, self.step, stream)

    def projection(self, epoch: int) -> Projection:
        """The drawn projection of an epoch (signs or Gaussian)."""
        source = philox(self.group["seed"], self.index, epoch, Stream.MOMENTUM)
        return draw_projection(self.plan.projection, self.view, self.plan.width, source, self.device)


def initial_state(plan: TensorPlan, group: Group, index: int, device: torch.device) -> State:
    """Every buffer of the plan: zeros, and for ``"adaptive"`` random signs over their bucket's norm."""
    state = {
        key: torch.zeros(buffer.shape, dtype=getattr(torch, buffer.dtype), device=device)
        for key, buffer in plan.buffers.items()
    }
    # Among fake tensors only what was made of a number knows its value, and every step reads this one.
    state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
    if "projection_weight" in state and device.type != "meta":
        weight = state["projection_weight"]
        signs = random_signs(weight.shape[-1], group["seed"], index, 0, Stream.MOMENTUM).expand_as(weight)
        weight.copy_(normalise_buckets(signs, plan.width, signs))
    return state


def step_tensor(param: Tensor, grad: Tensor, state: State, at: TensorStep) -> None:
    """Update one parameter and its state in place.

    Args:
        param: W, of the plan's shape.
        grad: G, likewise; any floating dtype.
        state: The buffers of ``at.plan``.
        at: The tensor, its options and the step.
    """
    grads = grad.reshape(at.view)
    scales = _second_moment(grads, state, at)
    directions, squares = _directions(grads, scales, state, at)
    _descend(param, directions, squares, at)


def _second_moment(grads: Tensor, state: State, at: TensorStep) -> tuple[Tensor, ...]:
    """Update the second moment; what every gradient is to be multiplied by."""
    eps1 = at.group["eps"][0]
    beta2 = torch.tensor(1.0 - float(at.step) ** at.group["decay_rate"], device=at.device)
    if not at.plan.factored:
        variance = state["variance"].view(at.view)
        for where in at.blocks():
            squares = grads[where].float().square().add_(eps1)
            variance[where] = pure.moving_average(variance[where], squares, beta2)
        return (variance,)
    batch, rows, columns = at.view
    row_sums = grads.new_empty((batch, rows, 1), dtype=torch.float32)
    col_sums = grads.new_zeros((batch, 1, columns), dtype=torch.float32)
    square_sums = _maybe_compiled(pure.square_sums, at)
    for where in at.blocks():
        row_sums[where], col_part = square_sums(grads[where])
        col_sums[where[0]] += col_part
    row_var, col_var = state["row_var"].view(batch, rows, 1), state["col_var"].view(batch, 1, columns)
    row_var.copy_(pure.moving_average(row_var, row_sums / columns + eps1, beta2))
    col_var.copy_(pure.moving_average(col_var, col_sums / rows + eps1, beta2))
    return pure.factors(row_var, col_var)


def _directions(grads: Tensor, scales: tuple[Tensor, ...], state: State, at: TensorStep) -> tuple[list[Tensor], Tensor]:
    """D block by block, and the sum of its squares; the momentum's buffers move on to the next step."""
    stored = _stored(state, at)
    projection, previous = _projections(grads, scales, stored, state, at)
    beta1, residual = at.group["beta1"], at.group["residual"]
    run = _maybe_compiled(_block_direction, at, at.plan, beta1, residual)
    directions, squares = [], torch.zeros((), device=at.device)
    for where in at.blocks():
        kept, bits = stored.read(where), stored.bits(where)
        direction, following, square = run(
            grads[where],
            _scales_of(scales, where),
            kept,
            bits,
            _of_batch(projection, where),
            _of_batch(previous, where),
            beta1,
            residual,
            stored.dtype,
            at.plan.width,
        )
        stored.write(where, following)
        directions.append(direction)
        squares += square
    return directions, squares


def _block_direction(
    grad: Tensor,
    scales: tuple[Tensor, ...],
    kept: tuple[Tensor, ...],
    bits: Tensor | None,
    projection: Projection | None,
    previous: Projection | None,
    beta1: float,
    residual: bool,
    dtype: StateDtype,
    width: int,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Normalise, load, move and store the momentum of one block: D, what is stored next, the sum of D²."""
    update = pure.normalise(grad, scales)
    if not kept:
        return update, (), square_norm(update)
    momentum = load(kept, dtype, width)
    direction, following = pure.momentum_step(update, momentum, projection, previous, beta1, residual)
    del update, momentum
    return direction, save(following, dtype, bits), square_norm(direction)


def square_norm(values: Tensor) -> Tensor:
    """The sum of squares, without a tensor of squares."""
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm.square()


def _descend(param: Tensor, directions: list[Tensor], squares: Tensor, at: TensorStep) -> None:
    """Clip, scale and apply the directions to the parameter."""
    group = at.group
    alpha = _step_size(param, at)
    size = alpha / (squares.div(param.numel()).sqrt() / group["clip_threshold"]).clamp(min=1.0)
    keep = 1 - alpha * group["weight_decay"]
    rounded = param.dtype == torch.bfloat16 and group["stochastic_rounding"]
    generator = at.generator(Stream.PARAMETER_ROUNDING) if rounded else None
    run = _maybe_compiled(_block_descend, at)
    # A parameter that is not contiguous in its view is written through a copy.
    viewable = _viewable(param, at.view)
    params = param.view(at.view) if viewable else param.reshape(at.view)
    for where, direction in zip(at.blocks(), directions, strict=True):
        target = params[where]
        bits = random_bits(target.shape, generator) if generator is not None else None
        target.copy_(run(target, direction, keep, size, bits))
    if not viewable:
        param.copy_(params.view(param.shape))


def _block_descend(param: Tensor, direction: Tensor, keep: Tensor, size: Tensor, bits: Tensor | None) -> Tensor:
    moved = pure.descend(param, direction, keep, size)
    return moved if bits is None else round_to_bfloat16(moved, bits)


def _step_size(param: Tensor, at: TensorStep) -> Tensor:
    """α, a scalar tensor on the parameter's device."""
    group = at.group
    lr = group["lr"]
    if group["relative_step"]:
        lr = min(1e-6 * at.step if group["warmup_init"] else 1e-2, at.step**-0.5)
    alpha = torch.as_tensor(lr, dtype=torch.float32, device=at.device).reshape(())
    if group["scale_parameter"]:
        norm = torch.linalg.vector_norm(param, dtype=torch.float32)
        alpha = alpha * (norm / param.numel() ** 0.5).clamp(min=group["eps"][1])
    return alpha


def _projections(
    grads: Tensor, scales: tuple[Tensor, ...], stored: StoredRows, state: State, at: TensorStep
) -> tuple[Projection | None, Projection | None]:
    """P of this step, and P of the step before where it differs."""
    if at.plan.momentum != "sketch":
        return None, None
    if at.plan.projection != "adaptive":
        previous = at.projection(at.epoch - 1) if at.opens_epoch else None
        return at.projection(at.epoch), previous
    batch, _, columns = at.view
    weight = state["projection_weight"].view(batch, 1, columns)
    current = BucketProjection.normalised(weight, at.plan.width)
    if at.step > 1 and not at.opens_epoch:
        return current, None
    previous = BucketProjection.normalised(weight.clone(), at.plan.width)
    weight.copy_(_learnt_weight(grads, scales, stored, previous, at))
    return current, previous


def _learnt_weight(
    grads: Tensor, scales: tuple[Tensor, ...], stored: StoredRows, previous: BucketProjection, at: TensorStep
) -> Tensor:
    """Two power iterations on β₁ decode(M) + (1 − β₁) U, from the old weights plus a little noise."""
    weight, width, beta1 = previous.weight, at.plan.width, at.group["beta1"]
    noise = adaptive_noise(at.view.columns, width, at.group["seed"], at.index, at.epoch)
    weight = normalise_buckets(weight + noise.to(at.device), width, weight)
    for _ in range(2):
        learner, grown = BucketProjection.normalised(weight, width), torch.zeros_like(weight)
        for where in at.blocks():
            update = pure.normalise(grads[where], _scales_of(scales, where))
            old = _of_batch(previous, where).decode(load(stored.read(where), stored.dtype, width))
            blended = old * beta1 + update * (1 - beta1)
            grown[where[0]] += power_iteration(blended, _of_batch(learner, where))
        weight = normalise_buckets(grown, width, weight)
    return weight


def adaptive_noise(n: int, k: int, seed: int, index: int, epoch: int) -> Tensor:
    """Seeded noise of norm about ``ADAPTIVE_NOISE`` in every bucket, uniform, float32 of (n,) on the CPU."""
    words = philox(seed, index, epoch, Stream.ADAPTIVE_NOISE).random_raw(n)
    uniform = torch.from_numpy((words >> 11).astype("float64") * 2.0**-53).mul_(2).sub_(1)
    return uniform.mul_(ADAPTIVE_NOISE * (3 * k / n) ** 0.5).float()


def _stored(state: State, at: TensorStep) -> StoredRows:
    """The momentum's buffers; a tensor without a view keeps its own in float32."""
    batch, rows, columns = at.view
    keys = [key for key in ("exp_avg", "exp_avg_scale") if key in state]
    dtype: StateDtype = at.plan.state_dtype if at.plan.view else "float32"
    return StoredRows(
        tuple(state[key].view(batch, rows, -1) for key in keys),
        at.plan.width if at.plan.view else columns,
        dtype,
        at.generator(Stream.STATE_ROUNDING) if keys and dtype != "float32" else None,
    )


def _scales_of(scales: tuple[Tensor, ...], where: Block) -> tuple[Tensor, ...]:
    """Row and column factors of a block, or the reciprocal root of its variance."""
    if len(scales) == 1:
        return (scales[0][where].rsqrt(),)
    row_factor, col_factor = scales
    return row_factor[where], col_factor[where[0]]


def _of_batch(projection: Any, where: Block) -> Any:
    """The projection of the matrices of a block, where each has its own weights."""
    if isinstance(projection, BucketProjection) and projection.weight.dim() == 3:
        return BucketProjection(projection.weight[where[0]], projection.gram)
    return projection


def _viewable(tensor: Tensor, view: MatrixView) -> bool:
    """Whether the tensor can be seen in its view without a copy."""
    try:
        tensor.view(view)
    except RuntimeError:
        return False
    return True


def _maybe_compiled(function: Callable[..., Any], at: TensorStep, *also: Hashable) -> Callable[..., Any]:
    if not at.group["compile"]:
        return function
    return _compiled(function, at.view, at.device, *also)


@cache
def _compiled(function: Callable[..., Any], *_specialised: Hashable) -> Callable[..., Any]:
    """The function under ``torch.compile``, once for each view, device and what else it is specialised to.

    Dynamo compiles one code object at most 8 times, and this many tensors' shapes, ratios and decays would
    be more: each combination gets a code object of its own. A new step or learning rate compiles nothing.
    """
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(copy, fullgraph=True, dynamic=False)
