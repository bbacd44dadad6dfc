"""Functions of one block of rows: encode, exchange, norm of the direction, update."""

from typing import NamedTuple

import torch
from torch import Tensor

from floragrad.policy import StateDtype
from floragrad.torch import update as pure
from floragrad.torch.projection import BucketProjection, Projection
from floragrad.torch.quantize import RoundingBits
from floragrad.torch.storage import load, save


class Ingredients(NamedTuple):
    """What a block's direction is made of: a gradient, and what a sketch adds or the momentum of every column."""

    grad: Tensor
    scales: pure.Scales
    exchange: pure.Exchange | None
    kept: tuple[Tensor, ...]
    beta1: float
    dtype: StateDtype
    room: Tensor

    def direction(self) -> tuple[Tensor, Tensor | None]:
        """D in two factors, all columns' and the rows'; all of it in the first where that is what is kept."""
        direction, rows = pure.within_rows(self.grad, self.scales.rest, self.room), self.scales.rows
        if not self.kept:
            return direction if self.exchange is None else self.exchange.direction(direction), rows
        if rows is not None:
            direction.mul_(rows)
        kept = load(self.kept, self.dtype, direction.shape[-1])
        return torch.lerp(kept, direction, 1 - self.beta1, out=direction), None


def signed(scales: pure.Scales, projection: Projection) -> BucketProjection | None:
    """The projection, if its signs can go with the columns' factors, as ‖V‖ does not see them."""
    if scales.rows is None or not isinstance(projection, BucketProjection):
        return None
    return projection if projection.has_signs else None


def encode(
    sketch: Tensor, norms: Tensor, grad: Tensor, scales: pure.Scales, projection: Projection, room: Tensor
) -> None:
    """Write what one block is encoded to into ``sketch``, and ‖V‖ of its rows into ``norms``.

    Of a :func:`signed` projection the columns' factors have been multiplied by the signs.
    """
    update = pure.within_rows(grad, scales.rest, room)
    torch.linalg.vector_norm(update, dim=-1, keepdim=True, out=norms)
    with_signs = signed(scales, projection)
    values = projection.encode(update, room) if with_signs is None else with_signs.add_up(update)
    if scales.rows is None:
        sketch.copy_(values)
    else:
        torch.mul(values, scales.rows, out=sketch)


def exchange(
    sketch: Tensor,
    rows: Tensor | None,
    kept: tuple[Tensor, ...],
    bits: RoundingBits | None,
    by: pure.Estimator,
    moves: bool,
    dtype: StateDtype,
) -> Tensor:
    """X / R of one block, written over encode(U); what it adds to ‖D‖²; the momentum moves on, if it is to."""
    values, following, square = by.exchange(sketch, load(kept, dtype, sketch.shape[-1]), room=sketch)
    if rows is None:
        sketch.copy_(values)
    else:
        torch.mul(values, rows.reciprocal(), out=sketch)  # dividing takes three times as long
    del values  # what rounding takes may take its place
    if moves:
        store(kept, save(following, dtype, bits))
    return square


def direction_square(of: Ingredients) -> Tensor:
    """‖D‖² of one block."""
    return pure.square_norm(*of.direction())


def move(
    param: Tensor,
    keep: Tensor | None,
    size: Tensor,
    bits: RoundingBits | None,
    state_bits: RoundingBits | None,
    of: Ingredients,
) -> None:
    """Move the parameter of one block, and the momentum of every column where that is what is kept; both in place."""
    direction, _ = of.direction()
    if of.kept:
        store(of.kept, save(direction, of.dtype, state_bits))
    pure.descend_(param, direction, keep, size, None if bits is None else bits.numbers())


def store(kept: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    """Write what a block's numbers are stored as."""
    for buffer, value in zip(kept, values, strict=True):
        buffer.copy_(value)
