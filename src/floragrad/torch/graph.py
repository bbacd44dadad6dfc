"""One tensor's step as one graph under ``torch.compile``, where all of the tensor is here."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from floragrad._streams import Stream
from floragrad.policy import StateDtype
from floragrad.torch import blocks
from floragrad.torch import update as pure
from floragrad.torch.compiling import graph_of, leaves
from floragrad.torch.learnt import POWER_ITERATIONS, grown, noisy
from floragrad.torch.passes import viewed
from floragrad.torch.projection import BucketProjection, normalise_buckets, random_signs
from floragrad.torch.quantize import RoundingBits
from floragrad.torch.storage import load, save
from floragrad.torch.tensor_step import State, TensorStep, TensorUpdate

PARTS = 16
"""Parts of a matrix that are read at once on a CPU for the squares of their rows: it foresees so many lines."""

AHEAD = 16
"""Tensors whose steps are prepared before the first of them is launched: some words for each row and column."""


def step_compiled(updates: Sequence[TensorUpdate]) -> None:
    """Update parameters and their states in place, as ``step.step_tensors`` does; ``at.is_compiled`` holds for each.

    What the graphs are given is drawn for some tensors at once: between graphs, which leave nothing else in the
    caches, the same code takes three times as long.
    """
    numbers_of = cache(_numbers)
    for first in range(0, len(updates), AHEAD):
        for launch in [_prepared(*update, numbers_of) for update in updates[first : first + AHEAD]]:
            launch()


def _prepared(
    param: Tensor, grad: Tensor, state: State, at: TensorStep, numbers_of: Callable[..., tuple[Tensor, ...]]
) -> Callable[[], None]:
    """One tensor's step, but for its graph's launch."""
    batch, rows, columns = at.view
    group, stored = at.group, at.stored(state)
    current, previous = _weights(state, at)
    kept = _Kept(
        state["row_var"].view(batch, rows, 1) if at.plan.factored else None,
        state["col_var"].view(batch, 1, columns) if at.plan.factored else None,
        None if at.plan.factored else state["variance"].view(at.view),
        stored.buffers,
        current,
    )
    drawn = _Drawn(
        previous,
        noisy(current, at) if current is not None and at.learns else None,
        stored.rounding,
        at.parameter_rounding(param.dtype),
    )
    beta2, decay = at.beta2, group["weight_decay"]
    numbers = _Numbers(*numbers_of(beta2, 1 - beta2, *group["eps"], group["clip_threshold"], decay))
    lr = at.step_lr
    (rate,) = (lr,) if isinstance(lr, Tensor) else numbers_of(lr)
    how = _How(
        stored.dtype,
        stored.width,
        at.is_learnt,
        group["beta1"] or 0.0,
        group["residual"],
        decay != 0,
        group["scale_parameter"],
        previous is not None,
    )
    sliced = _sliced(at, rounds=drawn.param_bits is not None)
    params, grads = viewed(param, sliced), viewed(grad, at.view)
    rest = (kept, drawn, numbers, rate)
    held = leaves(kept)
    tensors = [*held, *leaves(rest[1:])]
    graph = graph_of(
        _step,
        at.plan,
        how,
        param.dtype,
        grad.dtype,
        at.device,
        rate.device,
        # What has to be copied into the view is contiguous there, as is all that is drawn.
        tuple(each if each is None else each.stride() for each in (params, grads, *held)),
        tuple(each is None for each in drawn),
        torch.get_num_threads(),  # a CPU's graph is of so many
    )

    def launch() -> None:
        both = (
            param.reshape(sliced) if params is None else params,
            grad.reshape(at.view) if grads is None else grads,
        )
        graph([*both, *tensors], *both, *rest, how)
        if params is None:
            param.copy_(both[0].view(param.shape))

    return launch


def _sliced(at: TensorStep, *, rounds: bool) -> tuple[int, int, int, int]:
    """The parameter's view, its columns cut in the slices that a sketch is added in, if all of them are whole.

    Their buckets are neighbours there; of whole rows the compiler would read a sketch number by number where its width
    is no multiple of a register's. Where numbers are rounded it would write the slices to memory first.
    """
    batch, rows, columns = at.view
    width = columns if rounds or at.plan.momentum != "sketch" or columns % at.plan.width else at.plan.width
    return batch, rows, columns // width, width


def _weights(state: State, at: TensorStep) -> tuple[Tensor | None, Tensor | None]:
    """Of this step's P, old ones where new ones are to be learnt; of the P of the step before where it differs."""
    if at.plan.momentum != "sketch":
        return None, None
    if at.is_learnt:
        weight = at.learnt_weight(state)
        return weight, weight.clone() if at.learns else None

    def drawn(epoch: int) -> Tensor:
        signs = random_signs(at.view.columns, at.group["seed"], at.index, epoch, Stream.MOMENTUM)
        return signs.to(at.device)

    return drawn(at.epoch), drawn(at.epoch - 1) if at.opens_epoch else None


class _Kept(NamedTuple):
    """State, in the view, which the graph writes to; and what P is made of, state as well where it is learnt."""

    row_var: Tensor | None
    col_var: Tensor | None
    variance: Tensor | None
    momentum: tuple[Tensor, ...]
    weight: Tensor | None


class _Drawn(NamedTuple):
    """Weights of the step before's P where it differs, where new ones start if they are learnt, what to round with."""

    previous: Tensor | None
    start: Tensor | None
    state_bits: RoundingBits | None
    param_bits: RoundingBits | None


class _Numbers(NamedTuple):
    """What may change from step to step, in tensors of no dimension: as numbers they would be compiled in."""

    beta2: Tensor
    fresh: Tensor
    eps1: Tensor
    eps2: Tensor
    clip_threshold: Tensor
    weight_decay: Tensor


class _How(NamedTuple):
    """What a graph is compiled for."""

    dtype: StateDtype
    width: int
    is_learnt: bool
    beta1: float
    residual: bool
    decays: bool
    scales_parameter: bool
    changes_projection: bool

    def projection(self, weight: Tensor) -> BucketProjection:
        """P of weights that are learnt, or drawn."""
        if self.is_learnt:
            return BucketProjection.normalised(weight, self.width)
        drawn = BucketProjection.signs(len(weight), self.width, weight)
        return drawn if len(weight) % self.width == 0 else replace(drawn, gram=_in_memory(drawn.gram))


def _numbers(*values: float) -> tuple[Tensor, ...]:
    """Numbers as tensors of no dimension."""
    return torch.tensor(values, dtype=torch.float32, device="cpu").unbind()


def _step(param: Tensor, grad: Tensor, kept: _Kept, drawn: _Drawn, numbers: _Numbers, lr: Tensor, how: _How) -> None:
    alpha = lr
    if how.scales_parameter:
        alpha = alpha * pure.relative(pure.square_norm(param), param.numel(), numbers.eps2)
    scales = pure.Scales(None, _rest(grad, kept, numbers))
    exchange, square = None, None
    if kept.weight is None:
        scales = _with_rows(scales, _row_sums(grad), kept, numbers)
    else:
        scales, exchange, square = _exchanged(grad, scales, kept, kept.weight, drawn, numbers, how)
    stored = kept.momentum if exchange is None else ()
    of = blocks.Ingredients(grad, scales, exchange, stored, how.beta1, how.dtype, None)
    if square is None:
        square = blocks.direction_square(of)
    size = pure.clipped(alpha, _in_memory(square), param.numel(), numbers.clip_threshold)
    if scales.rows is not None and not stored:
        size = _in_memory(size * scales.rows).unsqueeze(-1)
    keep = 1 - alpha * numbers.weight_decay if how.decays else None
    bits = drawn.param_bits
    if bits is not None:
        bits = RoundingBits(bits.rows.unsqueeze(-1), bits.columns.view(param.shape[-2:]))
    blocks.move(param, keep, size, bits, drawn.state_bits, of)


def _exchanged(
    grad: Tensor,
    scales: pure.Scales,
    kept: _Kept,
    weight: Tensor,
    drawn: _Drawn,
    numbers: _Numbers,
    how: _How,
) -> tuple[pure.Scales, pure.Exchange, Tensor | None]:
    """Move the sketch on. What gradients are multiplied by, rows' factors too; X / R; ‖D‖² where it is known."""
    previous = None if drawn.previous is None else how.projection(drawn.previous)
    if drawn.start is not None:
        assert previous is not None
        scales = _with_rows(scales, _row_sums(grad), kept, numbers)
        weight.copy_(_learnt_weight(grad, scales, kept.momentum, previous, drawn.start, how))
    projection = how.projection(weight)
    by = pure.Estimator(projection, previous, how.beta1, how.residual)
    sketch, sums, squares = _read(grad, scales.rest, projection)
    if scales.rows is None:
        scales = _with_rows(scales, sums, kept, numbers)
    if scales.rows is not None:
        sketch, squares = sketch * scales.rows, squares * scales.rows.square()
    value, following, added = by.exchange(sketch, load(kept.momentum, how.dtype, how.width))
    blocks.store(kept.momentum, save(following, how.dtype, drawn.state_bits))
    if scales.rows is not None:
        value = value * _in_memory(scales.rows.reciprocal())
    square = squares.sum() * by.own**2 + added if by.knows_square else None
    return scales, pure.Exchange(_in_memory(value), by.reading, by.own), square


def _read(grad: Tensor, rest: Tensor, projection: BucketProjection) -> tuple[Tensor, Tensor, Tensor]:
    """encode(V), and Σ G² and ‖V‖² of each row: all by bucket first, so that it is one loop over the gradients."""
    if projection.has_signs:
        signed = rest * projection.columns  # squares do not see the signs
        update = pure.within_rows(grad, _in_memory(signed) if rest.shape[-2] == 1 else signed)
        sketch = projection.add_up(update)
    else:
        update = pure.within_rows(grad, rest)
        sketch = projection.encode(update)
    sums, squares = (
        _in_memory(projection.add_up(values).sum(-1, keepdim=True))
        for values in (grad.float().square(), update.square())
    )
    return _in_memory(sketch), sums, squares


def _rest(grad: Tensor, kept: _Kept, numbers: _Numbers) -> Tensor:
    """Update the second moment of columns, or of all numbers; their factors."""
    squares = grad.float().square()
    if kept.variance is not None:
        _average(kept.variance, squares, numbers)
        return kept.variance.rsqrt()
    assert kept.col_var is not None
    _average(kept.col_var, _in_memory(_column_sums(squares)) / grad.shape[-2], numbers)
    return _in_memory(kept.col_var.rsqrt())


def _with_rows(scales: pure.Scales, sums: Tensor, kept: _Kept, numbers: _Numbers) -> pure.Scales:
    """Update the second moment of rows, where they have one; their factors too."""
    if kept.row_var is None or kept.col_var is None:
        return scales
    _average(kept.row_var, sums / kept.col_var.shape[-1], numbers)
    rows = (kept.row_var / kept.row_var.mean(-2, keepdim=True)).rsqrt()
    return pure.Scales(_in_memory(rows), scales.rest)


def _average(average: Tensor, means: Tensor, numbers: _Numbers) -> None:
    """V ← β₂ V + (1 − β₂)(means + ε₁)."""
    average.copy_(average * numbers.beta2 + (means + numbers.eps1) * numbers.fresh)


def _row_sums(grad: Tensor) -> Tensor:
    return _in_memory(grad.float().square().sum(-1, keepdim=True))


def _column_sums(squares: Tensor) -> Tensor:
    """Of (batch, rows, n), in two steps on a CPU, where one would go down every few columns through all rows."""
    whole = squares.shape[-2] // PARTS * PARTS
    if squares.device.type != "cpu" or not whole:
        return squares.sum(-2, keepdim=True)
    parts = squares[..., :whole, :].reshape(len(squares), PARTS, -1, squares.shape[-1])
    sums = parts.sum(-3).sum(-2, keepdim=True)
    return sums if whole == squares.shape[-2] else sums + squares[..., whole:, :].sum(-2, keepdim=True)


def _learnt_weight(
    grad: Tensor,
    scales: pure.Scales,
    momentum: tuple[Tensor, ...],
    previous: BucketProjection,
    weight: Tensor,
    how: _How,
) -> Tensor:
    """Power iterations on β₁ decode(M) + (1 − β₁) U, from ``weight`` on."""
    for _ in range(POWER_ITERATIONS):
        growth = grown(grad, scales, momentum, how.dtype, previous, how.projection(weight), how.beta1)
        weight = _in_memory(normalise_buckets(growth, how.width, weight))
    return weight


def _in_memory(values: Tensor) -> Tensor:
    """The same, written to memory: a compiler may else compute it anew for every number that it goes into.

    Rows' and columns' factors, roots of quotients, then cost more than all the rest (``docs/performance.md``). A view
    by strides is of memory, so there has to be some.
    """
    return values.as_strided(values.shape, values.stride())
