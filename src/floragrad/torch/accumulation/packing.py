"""Rows of sketches as bytes, to be sent to other processes in their storage format."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import torch
from torch import Tensor

from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.storage import Block, StoredRows

REDUCE_ELEMENTS: Final = 2**18
"""Elements of each rank that are float32 at a time while they are summed."""


@dataclass(frozen=True)
class PackedSketch:
    """Sketch, and its rows with the random bits that round their sums."""

    sketch: GradientSketch
    stored: StoredRows

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return sum(buffer.shape[-1] * buffer.element_size() for buffer in self.stored.buffers)

    def pack(self, where: Block) -> list[Tensor]:
        """Return the storage of some rows as bytes."""
        return [part.contiguous().view(torch.uint8).flatten() for part in self.stored.read(where)]

    def unpack(self, sent: Tensor, where: Block) -> tuple[Tensor, ...]:
        """Return the tensors that :meth:`pack` has sent, in their dtypes and shapes."""
        parts, first = [], 0
        for buffer in self.stored.buffers:
            shape = (1, where[1].stop - where[1].start, buffer.shape[-1])
            last = first + prod(shape) * buffer.element_size()
            # A copy: wider elements must be aligned.
            parts.append(sent[first:last].clone().view(buffer.dtype).view(shape))
            first = last
        return tuple(parts)

    def write_sum(self, where: Block, sent: Sequence[Tensor]) -> None:
        """Replace some rows by their sum over what every rank has sent of them, a few float32 rows at a time."""
        matrix, rows = where
        parts = [self.unpack(each, where) for each in sent]
        height = max(1, REDUCE_ELEMENTS // self.stored.width)
        for top in range(rows.start, rows.stop, height):
            block = slice(top, min(top + height, rows.stop))
            local = slice(top - rows.start, block.stop - rows.start)
            self.sketch.write_sum(
                (matrix, block), [tuple(buffer[:, local] for buffer in part) for part in parts], self.stored
            )


Piece = tuple[PackedSketch, Block]
"""Rows of one matrix of a sketch."""


def packed(share: Sequence[Piece], device: torch.device) -> Tensor:
    """Return pieces as bytes, one after the other."""
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    return torch.cat([nothing, *(part for each, where in share for part in each.pack(where))])


def byte_count(share: Sequence[Piece]) -> int:
    """Return the bytes of :func:`packed`."""
    return sum((where[1].stop - where[1].start) * each.row_bytes for each, where in share)


def split(share: Sequence[Piece], received: Sequence[Tensor]) -> Iterator[tuple[PackedSketch, Block, list[Tensor]]]:
    """Yield each piece with the bytes that every rank sent for it."""
    first = 0
    for each, where in share:
        last = first + byte_count([(each, where)])
        if last > first:
            yield each, where, [sent[first:last] for sent in received]
        first = last
