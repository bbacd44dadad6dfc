"""Eager backend: the update in PyTorch operations, for any device and dtype; the implementation to read first.

Blocks of rows are processed one by one, so that temporaries stay small beside the tensor. Three passes: the
normalisation needs the statistics of all rows, and the clipping needs the norm of the whole update. Nothing
synchronizes with an accelerator.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from floragrad.policy import MatrixView, TensorPlan
from floragrad.torch import update as pure
from floragrad.torch.adaptive import learn_weights, power_iteration_step
from floragrad.torch.context import ParamUpdate, StepContext, random_requests
from floragrad.torch.part import Part, Passes, ShardSum
from floragrad.torch.projection import BucketProjection, Projection
from floragrad.torch.random import Request, draw_words, signs
from floragrad.torch.storage import (
    Block,
    StoredRows,
    block_elements,
    dequantize_squares,
    load,
    max_block_elements,
    quantize_squares_,
    row_blocks,
    save,
)

DRAWN_WORDS: Final = 2**22
"""Random words that are drawn together on an accelerator, 32 MiB: the launches of a draw do not depend on its size."""

Words = Mapping[str, Tensor]


def name() -> str:
    """Return the backend's name."""
    return "eager"


def unsupported_reason(tensor: Tensor, plan: TensorPlan, part: Part) -> str:  # noqa: ARG001
    """Return an empty string: the backend supports every tensor."""
    return ""


def supports(update: ParamUpdate) -> bool:  # noqa: ARG001
    """Return True: the backend supports every step."""
    return True


def passes(updates: Sequence[ParamUpdate]) -> Iterator[Passes]:
    """Yield the passes of each tensor, to be run one after the other or interleaved.

    Each yields sums, to be added up over all parts of the tensor before it resumes.
    """
    for update, words in with_words(updates):
        yield EagerStep(update, words).run()


def with_words(updates: Sequence[ParamUpdate]) -> Iterator[tuple[ParamUpdate, Words]]:
    """Yield each update with its random words, which are drawn for many tensors together on an accelerator."""
    for chunk in _chunks(updates):
        requests = [request for _, named in chunk for request in named.values()]
        drawn = iter(draw_words(requests, chunk[0][0].ctx.device))
        words = [dict(zip(named, drawn, strict=False)) for _, named in chunk]
        for (update, _), its_words in zip(chunk, words, strict=True):
            yield update, its_words


def _chunks(updates: Sequence[ParamUpdate]) -> Iterator[list[tuple[ParamUpdate, dict[str, Request]]]]:
    """Yield the updates whose words are drawn together, with their requests: one on the CPU, many on an accelerator."""
    chunk: list[tuple[ParamUpdate, dict[str, Request]]] = []
    total = 0
    for update in updates:
        requests, device = random_requests(update), update.ctx.device
        count = sum(each.words for each in requests.values())
        if chunk and (device.type == "cpu" or device != chunk[0][0].ctx.device or total + count > DRAWN_WORDS):
            yield chunk
            chunk, total = [], 0
        chunk.append((update, requests))
        total += count
    if chunk:
        yield chunk


class EagerStep:
    """One step of one tensor.

    The second pass updates a sketched momentum and keeps its correction of the direction for the third: 1/ρ of the
    tensor, in float32. Sharded tensors wait for collectives in between, all at once, where the corrections would take
    1/ρ of the model: there the third pass computes them again.
    """

    def __init__(self, update: ParamUpdate, words: Words) -> None:
        self._param, grad, self._state, self._ctx = update
        ctx = update.ctx
        self._words = words
        self._grads = grad.reshape(ctx.view)
        self._stored = self._stored_rows()
        self._scales = pure.Scales(None, self._grads)  # without rows, until factored statistics are known
        self._variances = ctx.variances(self._state)
        self._estimator: pure.Estimator | None = None
        self._corrections: Tensor | None = None
        self._holds_corrections = ctx.splits_sketch or not ctx.part.split

    def run(self) -> Passes:
        """Update parameter and state in place."""
        ctx = self._ctx
        norm = pure.square_norm(self._param) if ctx.group["scale_parameter"] else None
        yield from self._statistics(norm)
        if ctx.is_sketched:
            projection, previous = self._projections()
            if ctx.learns_weights:
                assert previous is not None
                yield from self._learn_weights(previous)
            self._estimator = pure.Estimator(projection, previous, ctx.group["beta1"], ctx.group["residual"])
        square = yield from self._direction()
        yield [ctx.shard_sum(square)]
        alpha = ctx.step_lr
        if norm is not None:
            alpha = pure.parameter_scale(norm, ctx.numel, ctx.group["eps"][1]) * alpha
        self._apply(square, alpha)

    def _statistics(self, norm: Tensor | None) -> Passes:
        """Update the second moment; set the factors of the gradient."""
        ctx, state, eps1, beta2 = self._ctx, self._state, self._ctx.group["eps"][0], self._ctx.beta2
        sums = [] if norm is None else [ctx.shard_sum(norm)]
        if not ctx.plan.factored:
            yield sums
            self._average_squares(eps1, beta2)
            return
        assert ctx.plan.view is not None
        _, all_rows, all_columns = ctx.plan.view
        batch, rows, columns = ctx.view
        row_sums = self._grads.new_empty((batch, rows, 1), dtype=torch.float32)
        col_sums = self._grads.new_zeros((batch, 1, columns), dtype=torch.float32)
        workspace = self._workspace()
        for block in self._blocks():
            grad = self._grads[block]
            pure.add_square_sums_(grad, row_sums[block], col_sums[block[0]], _part_of(workspace, grad))
        row_var, col_var = state["row_var"].view(batch, rows, 1), state["col_var"].view(batch, 1, columns)
        # The new total of the rows, computed from sums, so that one sum over parts is enough.
        row_total = row_var.sum(-2, keepdim=True).mul_(beta2 / ctx.part.column_parts)
        row_total.add_(row_sums.sum(-2, keepdim=True), alpha=(1 - beta2) / all_columns)
        shares = [ctx.shard_sum(col_sums, ("rows",)), ctx.shard_sum(row_total, ("rows", "columns"))]
        yield [*sums, *shares, ctx.shard_sum(row_sums, ("columns",))]
        pure.average_(row_var, row_sums, all_columns, beta2, eps1)
        pure.average_(pure.saturate_(col_var), col_sums, all_rows, beta2, eps1)
        row_mean = row_total.div_(all_rows).add_((1 - beta2) * eps1)
        self._scales = pure.factored_scales(row_var, row_mean, col_var)

    def _average_squares(self, eps1: float, beta2: float) -> None:
        """Update a second moment of every element."""
        ctx, rounding = self._ctx, None
        if "variance" in self._words:
            assert ctx.plan.view is not None
            rounding = ctx.part.rounding(self._words["variance"], ctx.plan.view.columns, ctx.part.columns)
        for block in self._blocks():
            squares = self._grads[block].float().square()
            average = self._variance(block)
            pure.average_(pure.saturate_(average), squares, 1, beta2, eps1)
            del squares
            if rounding is not None:
                kept = quantize_squares_(pure.saturate_(average), rounding.of(block).integers())
                for buffer, value in zip(self._variances, kept, strict=True):
                    buffer[block] = value

    def _variance(self, block: Block) -> Tensor:
        """Return the second moment of a block's elements: where it lies, but for 8 bits."""
        kept = [buffer[block] for buffer in self._variances]
        return kept[0] if len(kept) == 1 else dequantize_squares(*kept)

    def _projections(self) -> tuple[Projection, Projection | None]:
        """Return P of this step (with the old weights where new ones are to be learnt), and P before if it differs."""
        ctx, width = self._ctx, self._ctx.plan.width
        if ctx.is_adaptive:
            weight = ctx.adaptive_weight(self._state)
            previous = BucketProjection.normalised(weight.clone(), width) if ctx.learns_weights else None
            return BucketProjection.normalised(weight, width), previous
        now = ctx.projection(ctx.resample_index, self._signs("signs"))
        if not ctx.is_resample_step:
            return now, None
        return now, ctx.projection(ctx.resample_index - 1, self._signs("old signs"))

    def _signs(self, name: str) -> Tensor | None:
        assert self._ctx.plan.view is not None
        return signs(self._words[name], self._ctx.plan.view.columns) if name in self._words else None

    def _learn_weights(self, previous: Projection) -> Passes:
        ctx, width = self._ctx, self._ctx.plan.width

        def power_products(weight: Tensor) -> Tensor:
            learner, product = BucketProjection.normalised(weight, width), torch.zeros_like(weight)
            for block in self._blocks():
                momentum = load(self._stored.read(block), self._stored.dtype, width)
                bases = _of_batch(previous, block), _of_batch(learner, block)
                product[block[0]] += power_iteration_step(
                    self._grads[block], self._scales_of(block), momentum, *bases, ctx.group["beta1"]
                )
            return product

        return learn_weights(ctx, ctx.adaptive_weight(self._state), power_products, self._words["noise"])

    def _direction(self) -> Generator[list[ShardSum], None, Tensor]:
        """Return this part's share of ‖D‖²."""
        ctx, estimator = self._ctx, self._estimator
        if estimator is None:
            return self._direction_square()
        sketches, square = self._encode(estimator)
        if ctx.splits_sketch:
            yield [ctx.shard_sum(sketches, ("columns",))]
        added = self._correct(sketches, estimator, moves=self._holds_corrections)
        self._corrections = sketches
        if estimator.has_closed_form_norm:
            weight, parts = estimator.update_weight, ctx.part.column_parts
            square = (square if weight == 1 else square * weight**2) + (added if parts == 1 else added / parts)
        else:
            square = self._direction_square()
        if not self._holds_corrections:
            self._corrections = None
        return square

    def _apply(self, square: Tensor, alpha: float | Tensor) -> None:
        """Clip, decay, round and write the parameter; update a momentum of every column."""
        ctx, decay = self._ctx, self._ctx.group["weight_decay"]
        size = pure.clipped_step_size(alpha * ctx.sign, square, ctx.numel, ctx.group["clip_threshold"])
        rows = None if self._keeps_columns else self._scales.rows
        sizes = size if rows is None else size * rows
        keep = torch.as_tensor(1 - alpha * decay, dtype=torch.float32, device=ctx.device) if decay else None
        if self._estimator is not None and self._corrections is None:
            self._corrections, _ = self._encode(self._estimator)
            self._correct(self._corrections, self._estimator, moves=True)
        rounding = None
        if "parameter" in self._words:
            rounding = ctx.part.rounding(self._words["parameter"], ctx.parameter_width, ctx.part.columns)
        workspace = self._workspace(rounds=rounding is not None)
        with _seen_in(ctx.view, self._param) as params:
            for block in self._blocks(rounds=rounding is not None):
                direction, _ = self._direction_of(block, workspace)
                if self._keeps_columns:
                    self._stored.write(block, save(direction, self._stored.dtype, self._stored.bits(block)))
                bits = None if rounding is None else rounding.of(block).integers()
                pure.descend_(params[block], direction, keep, sizes if rows is None else sizes[block], bits)

    def _encode(self, estimator: pure.Estimator) -> tuple[Tensor, Tensor]:
        """Return encode(U) of all rows, from the local columns, and ‖U‖²."""
        scales, projection = self._scales, estimator.projection
        # Signs do not change ‖V‖, so the columns' factors include them.
        is_signed = scales.rows is not None and isinstance(projection, BucketProjection) and projection.has_signs
        if is_signed:
            assert isinstance(projection, BucketProjection)
            scales = scales._replace(columns=scales.columns * projection.columns)
        sketches = self._grads.new_empty((*self._ctx.view[:2], self._stored.width), dtype=torch.float32)
        norms = self._grads.new_empty((*self._ctx.view[:2], 1), dtype=torch.float32)
        workspace = self._workspace()
        for block in self._blocks():
            grad, basis = self._grads[block], _of_batch(projection, block)
            columns = self._scales_of(block).columns if scales.rows is None else scales.columns[block[0]]
            update = pure.scale_columns(grad, columns, _part_of(workspace, grad))
            torch.linalg.vector_norm(update, dim=-1, keepdim=True, out=norms[block])
            if is_signed:
                assert isinstance(basis, BucketProjection)
                encoded = basis.sum_buckets(update)
            else:
                encoded = basis.encode(update, update)
            if scales.rows is None:
                sketches[block] = encoded
            else:
                torch.mul(encoded, scales.rows[block], out=sketches[block])
        if scales.rows is not None:
            norms.mul_(scales.rows)
        return sketches, norms.square_().sum()

    def _correct(self, sketches: Tensor, estimator: pure.Estimator, *, moves: bool) -> Tensor:
        """Replace encode(U) by X / R; return ‖D‖² − a²‖U‖² where it is known; update M with ``moves``."""
        stored, rows = self._stored, self._scales.rows
        total: Tensor | None = None
        for block in sketch_blocks(self._ctx):
            local = estimator._replace(
                projection=_of_batch(estimator.projection, block), previous=_of_batch(estimator.previous, block)
            )
            sketch = sketches[block]
            momentum = load(stored.read(block), stored.dtype, stored.width)
            values, next_momentum, added = local.correction(sketch, momentum, workspace=sketch)
            del momentum
            if rows is None:
                sketch.copy_(values)
            else:
                torch.mul(values, rows[block].reciprocal(), out=sketch)  # a division takes three times as long
            del values  # frees memory for the rounding
            if moves:
                stored.write(block, save(next_momentum, stored.dtype, stored.bits(block)))
            total = added if total is None else total + added
        return torch.zeros((), dtype=torch.float32, device=self._ctx.device) if total is None else total

    def _direction_square(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=self._ctx.device)
        workspace = self._workspace()
        for block in self._blocks():
            total += pure.square_norm(*self._direction_of(block, workspace))
        return total

    def _direction_of(self, block: Block, workspace: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return D of a block as two factors, of elements and of rows; a whole momentum has the first alone."""
        grad, scales = self._grads[block], self._scales_of(block)
        direction = pure.scale_columns(grad, scales.columns, _part_of(workspace, grad))
        if self._keeps_columns:
            if scales.rows is not None:
                direction.mul_(scales.rows)
            kept = load(self._stored.read(block), self._stored.dtype, direction.shape[-1])
            return torch.lerp(kept, direction, 1 - self._ctx.group["beta1"], out=direction), None
        if self._estimator is not None:
            assert self._corrections is not None
            local = self._estimator._replace(
                projection=_of_batch(self._estimator.projection, block),
                previous=_of_batch(self._estimator.previous, block),
            )
            pure.add_correction_(direction, self._corrections[block], local)
        return direction, scales.rows

    @property
    def _keeps_columns(self) -> bool:
        """True if the momentum keeps every column."""
        return not self._ctx.is_sketched and bool(self._stored.buffers)

    def _scales_of(self, block: Block) -> pure.Scales:
        """Return the factors of a block; those of a full second moment are computed here."""
        if self._scales.rows is None:
            return pure.Scales(None, self._variance(block).rsqrt())
        return pure.Scales(self._scales.rows[block], self._scales.columns[block[0]])

    def _stored_rows(self) -> StoredRows:
        ctx, state = self._ctx, self._state
        rounding = None
        if "state" in self._words:
            rounding = ctx.part.rounding(self._words["state"], ctx.plan.width, ctx.sketch_columns)
        return ctx.stored(state, rounding)

    def _blocks(self, *, rounds: bool = False) -> Iterator[Block]:
        return step_blocks(self._ctx, rounds=rounds)

    def _workspace(self, *, rounds: bool = False) -> Tensor:
        """Return memory for a block in float32."""
        matrices, rows = next(self._blocks(rounds=rounds), (slice(0, 0), slice(0, 0)))  # no later block is larger
        elements = matrices.stop * rows.stop * self._ctx.view.columns
        return torch.empty(elements, dtype=torch.float32, device=self._ctx.device)


def step_blocks(ctx: StepContext, *, rounds: bool = False) -> Iterator[Block]:
    """Yield batches and rows of the view, the largest first; the whole of a small one.

    Args:
        ctx: The step.
        rounds: True if elements of a block are rounded, which takes three more buffers and smaller blocks.
    """
    total = ctx.view.numel
    elements = block_elements(total, ctx.device)
    if ctx.plan.view is None and elements < total:
        elements //= 2  # the random words of all elements take as much memory as half of the blocks
    if rounds and elements < total:
        elements //= 4
    return row_blocks(ctx.view, elements, gaussian=ctx.is_gaussian)


def sketch_blocks(ctx: StepContext) -> Iterator[Block]:
    """Yield batches and rows of the sketch, whose shorter rows make higher blocks."""
    if ctx.is_gaussian:
        return step_blocks(ctx)  # a transfer decodes the sketch to all columns
    # The update of a sketch has up to three temporaries of its size.
    elements = min(block_elements(ctx.view.numel, ctx.device), max_block_elements(ctx.device) * 3 // 8)
    return row_blocks(ctx.view._replace(columns=ctx.plan.width), min(elements, ctx.view.numel))


def _part_of(workspace: Tensor, grad: Tensor) -> Tensor:
    """Return a workspace's view of the shape of a block."""
    return (workspace if workspace.numel() == grad.numel() else workspace[: grad.numel()]).view(grad.shape)


def _of_batch(projection: Any, block: Block) -> Any:
    """Return the projection of the matrices of a block, where each has its own weights."""
    if isinstance(projection, BucketProjection) and projection.weight.dim() == 3:
        return replace(projection, weight=projection.weight[block[0]])
    return projection


@contextmanager
def _seen_in(view: MatrixView, param: Tensor) -> Iterator[Tensor]:
    """Yield a parameter in its matrix view, to be written; through a copy where it cannot be viewed."""
    try:
        params = param.view(view)
    except RuntimeError:
        copy = param.reshape(view)
        yield copy
        param.copy_(copy.view(param.shape))
    else:
        yield params
