"""The passes over a tensor that make and apply its update, a block of rows at a time."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from floragrad.policy import MatrixView
from floragrad.torch import blocks
from floragrad.torch import update as pure
from floragrad.torch.part import ShardSum
from floragrad.torch.projection import BucketProjection
from floragrad.torch.storage import Block, StoredRows
from floragrad.torch.tensor_step import TensorStep


class UpdatePasses:
    """The passes over a tensor once its second moment and projections are known.

    A sketched momentum moves in the first of them, and what it adds to the direction is held until the last: 1/ρ of
    the tensor, in float32. Where other parts have to be waited for in between, with all tensors at once, that would
    be 1/ρ of the model: there it is computed again.

    Args:
        grads: G in the view of the part.
        scales: What every gradient is multiplied by.
        stored: The momentum.
        estimator: How a sketch moves; None where every column is kept, or none.
        at: The tensor, its options and the step.
    """

    def __init__(
        self,
        grads: Tensor,
        scales: pure.Scales,
        stored: StoredRows,
        estimator: pure.Estimator | None,
        at: TensorStep,
    ) -> None:
        self._grads, self._scales, self._stored, self._by, self._at = grads, scales, stored, estimator, at
        self._keeps_all = estimator is None and bool(stored.buffers)
        self._exchanges: Tensor | None = None

    def direction_square(self) -> Generator[list[ShardSum], None, Tensor]:
        """‖D‖² of what is here.

        Yields:
            Sums that have to be over all parts when the generator goes on.
        """
        by, at = self._by, self._at
        if by is None:
            return self._square_of_directions()
        is_held = at.splits_sketch or not at.part.split
        sketches, square = self._encoded()
        if at.splits_sketch:
            yield [ShardSum(sketches, ("columns",))]
        exchanged = self._exchange(sketches, moves=is_held)
        self._exchanges = sketches
        if by.knows_square:
            own = square if by.own == 1 else square * by.own**2
            square = own + (exchanged if at.part.column_parts == 1 else exchanged / at.part.column_parts)
        else:
            square = self._square_of_directions()
        if not is_held:
            self._exchanges = None
        return square

    def move(self, param: Tensor, square: Tensor, alpha: float | Tensor) -> None:
        """Clip, scale and apply D to the parameter; the momentum's buffers move on to the next step."""
        at, decay = self._at, self._at.group["weight_decay"]
        size = pure.clipped(alpha * at.sign, square, torch.Size(at.plan.shape).numel(), at.group["clip_threshold"])
        rows = None if self._keeps_all else self._scales.rows
        sizes = size if rows is None else size * rows
        keep = torch.as_tensor(1 - alpha * decay, dtype=torch.float32, device=at.device) if decay else None
        if self._by is not None and self._exchanges is None:
            self._exchanges, _ = self._encoded()
            self._exchange(self._exchanges, moves=True)
        rounding = at.parameter_rounding(param.dtype)
        rounds = rounding is not None
        room = at.room(rounds=rounds)
        with seen_in(at.view, param) as params:
            for where in at.blocks(rounds=rounds):
                bits = None if rounding is None else rounding.of(where)
                size = sizes if rows is None else sizes[where]
                blocks.move(params[where], keep, size, bits, self._stored.bits(where), self._ingredients(where, room))

    def _encoded(self) -> tuple[Tensor, Tensor]:
        """encode(U) of all rows, of the columns that are here, and ‖U‖²."""
        assert self._by is not None
        at, scales = self._at, self._scales
        with_signs = blocks.signed(scales, self._by.projection)
        if with_signs is not None:
            scales = scales._replace(rest=scales.rest * with_signs.columns)
        sketches = self._grads.new_empty((*at.view[:2], self._stored.width), dtype=torch.float32)
        norms = self._grads.new_empty((*at.view[:2], 1), dtype=torch.float32)
        room = at.room()
        for where in at.blocks():
            grad, projection = self._grads[where], of_batch(self._by.projection, where)
            of_block = scales_of(scales, where)
            blocks.encode(sketches[where], norms[where], grad, of_block, projection, room_for(grad, room))
        if scales.rows is not None:
            norms.mul_(scales.rows)
        return sketches, norms.square_().sum()

    def _exchange(self, sketches: Tensor, *, moves: bool) -> Tensor:
        """Replace encode(U) by X / R; ‖D‖² − a²‖U‖² where it is known; M moves on, if it is to."""
        at, stored, by = self._at, self._stored, self._by
        assert by is not None
        total: Tensor | None = None
        for where in at.sketch_blocks():
            here = by._replace(projection=of_batch(by.projection, where), previous=of_batch(by.previous, where))
            rows = None if self._scales.rows is None else self._scales.rows[where]
            added = blocks.exchange(
                sketches[where], rows, stored.read(where), stored.bits(where), here, moves, stored.dtype
            )
            total = added if total is None else total + added
        return torch.zeros((), dtype=torch.float32, device=at.device) if total is None else total

    def _square_of_directions(self) -> Tensor:
        at = self._at
        total = torch.zeros((), dtype=torch.float32, device=at.device)
        room = at.room()
        for where in at.blocks():
            total += blocks.direction_square(self._ingredients(where, room))
        return total

    def _ingredients(self, where: Block, room: Tensor) -> blocks.Ingredients:
        grad, by = self._grads[where], self._by
        exchange = None
        if by is not None:
            assert self._exchanges is not None
            exchange = pure.Exchange(self._exchanges[where], of_batch(by.reading, where), by.own)
        return blocks.Ingredients(
            grad,
            scales_of(self._scales, where),
            exchange,
            self._stored.read(where) if self._keeps_all else (),
            self._at.group["beta1"],
            self._stored.dtype,
            room_for(grad, room),
        )


def room_for(grad: Tensor, room: Tensor) -> Tensor:
    """Of :meth:`TensorStep.room`, what a block takes."""
    return (room if room.numel() == grad.numel() else room[: grad.numel()]).view(grad.shape)


def scales_of(scales: pure.Scales, where: Block) -> pure.Scales:
    """Those of a block; where numbers have factors of their own, they are roots of the variance, taken here."""
    if scales.rows is None:
        return pure.Scales(None, scales.rest[where].rsqrt())
    return pure.Scales(scales.rows[where], scales.rest[where[0]])


def of_batch(projection: Any, where: Block) -> Any:
    """The projection of the matrices of a block, where each has its own weights."""
    if isinstance(projection, BucketProjection) and projection.weight.dim() == 3:
        return replace(projection, weight=projection.weight[where[0]])
    return projection


def viewed(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A tensor in another shape; None where it does not lie so."""
    try:
        return tensor.view(shape)
    except RuntimeError:
        return None


@contextmanager
def seen_in(view: MatrixView, param: Tensor) -> Iterator[Tensor]:
    """A parameter in its view, to be written to; where it does not lie so, through a copy."""
    params = viewed(param, view)
    if params is not None:
        yield params
        return
    copy = param.reshape(view)
    yield copy
    param.copy_(copy.view(param.shape))
