"""Rows of numbers kept in few bits, visited in blocks, so that only a block of them is ever float32."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from torch import Tensor

from floragrad.policy import MatrixView, StateDtype
from floragrad.torch.quantize import RoundingBits, dequantize, quantize, round_to_bfloat16

Block = tuple[slice, slice]
"""Some matrices of a view, and some of their rows."""


def row_blocks(view: MatrixView, elements: int, *, gaussian: bool = False) -> Iterator[Block]:
    """Batches and rows of a view, a block at a time.

    Args:
        view: The tensor as (batch, rows, columns).
        elements: Numbers in a block, as long as a row has no more.
        gaussian: As few blocks as two buffers allow: a Gaussian projection is drawn again for each.
    """
    batch, rows, columns = view
    height = max(1, ceil(rows / 8) if gaussian else min(rows, elements // columns))
    depth = max(1, elements // (rows * columns)) if height == rows else 1
    for first in range(0, batch, depth):
        for top in range(0, rows, height):
            yield slice(first, min(first + depth, batch)), slice(top, min(top + height, rows))


@dataclass(frozen=True)
class StoredRows:
    """The buffers of some rows, read and written a block at a time.

    Attributes:
        buffers: ``data``, (batch, rows, ...), and ``scale`` where it is low-bit; none where nothing is kept.
        width: Numbers in a row.
        dtype: How they are stored.
        rounding: What the bits to round with are made of; None where nothing is rounded.
    """

    buffers: tuple[Tensor, ...]
    width: int
    dtype: StateDtype
    rounding: RoundingBits | None

    def read(self, where: Block) -> tuple[Tensor, ...]:
        """What is stored of a block; for :func:`load`."""
        return tuple(buffer[where] for buffer in self.buffers)

    def write(self, where: Block, values: tuple[Tensor, ...]) -> None:
        """Store what :func:`save` made of a block."""
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer[where] = value

    def bits(self, where: Block) -> RoundingBits | None:
        """What to round one block with; None where nothing is rounded."""
        return None if self.rounding is None else self.rounding.of(where)


def load(kept: tuple[Tensor, ...], dtype: StateDtype, width: int) -> Tensor:
    """The float32 rows that :func:`save` stored; of float32 storage the very tensor that was given."""
    if dtype in ("int8", "int4"):
        payload, scale = kept
        return dequantize(payload, scale, dtype, width)
    return kept[0].float()


def save(values: Tensor, dtype: StateDtype, bits: RoundingBits | None) -> tuple[Tensor, ...]:
    """What is stored of float32 rows, rounded stochastically with ``bits``."""
    if bits is None:
        return (values,)
    if dtype == "bfloat16":
        return (round_to_bfloat16(values, bits.numbers()),)
    return quantize(values, dtype, bits.numbers())
