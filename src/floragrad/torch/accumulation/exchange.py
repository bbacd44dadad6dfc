"""Sketches summed over processes, in the bits that they are kept in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import torch
from torch import Tensor

from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.distributed.collectives import BUCKET_BYTES, Ranks
from floragrad.torch.storage import Block, StoredRows

SUM_ELEMENTS: Final = 2**18
"""So many numbers of each rank are float32 at a time while they are summed."""


def sum_sketches(sketches: Sequence[GradientSketch], window: int, ranks: Ranks) -> None:
    """Leave the sum of all ranks' sketches in every rank's, bit for bit the same; with it go the noises.

    What is float32 is all-reduced. What is rounded is sent as it is kept: each rank receives its share of the rows
    from all others, sums them in float32, rounds the sums stochastically with bits of its own, and sends them to
    all. A rank sends 2(R − 1)/R times the bytes of the sketches, where an all-reduce of float32 sends as often four
    bytes for every number. Every rounding is unbiased, so the sum is.

    Args:
        sketches: The same on all ranks and in the same order, each holding a gradient or zeros.
        window: Which window; the rounding of the sums is drawn for it.
        ranks: Who sums.
    """
    sum_rounded(sketches, window, ranks)
    kept = {"float32": "data"}  # of what is rounded the sums are there, but not those of their noises
    ranks.sum_([each.buffers[kept.get(each.plan.state_dtype, "noise")] for each in sketches])


def sum_rounded(sketches: Sequence[GradientSketch], window: int, ranks: Ranks) -> None:
    """As :func:`sum_sketches`, but only those in few bits, and without their noises."""
    rounded = [_Rounded(each, each.sums(window)) for each in sketches if each.plan.state_dtype != "float32"]
    for bucket in _buckets(rounded):
        _sum_rows(bucket, ranks)


@dataclass(frozen=True)
class _Rounded:
    """A sketch in few bits, and its rows with the bits that their sums are rounded with."""

    sketch: GradientSketch
    stored: StoredRows

    @property
    def row_bytes(self) -> int:
        return sum(buffer.shape[-1] * buffer.element_size() for buffer in self.stored.buffers)

    def pack(self, where: Block) -> list[Tensor]:
        """What is kept of some rows, as bytes."""
        return [part.contiguous().view(torch.uint8).flatten() for part in self.stored.read(where)]

    def unpack(self, sent: Tensor, where: Block) -> tuple[Tensor, ...]:
        """What :meth:`pack` has sent, with its own dtypes and shapes."""
        parts, first = [], 0
        for buffer in self.stored.buffers:
            shape = (1, where[1].stop - where[1].start, buffer.shape[-1])
            last = first + prod(shape) * buffer.element_size()
            # A copy: wider numbers cannot be read where bytes happen to lie.
            parts.append(sent[first:last].clone().view(buffer.dtype).view(shape))
            first = last
        return tuple(parts)


Piece = tuple[_Rounded, Block]
"""Some rows of one matrix of a sketch."""


def _buckets(rounded: Sequence[_Rounded]) -> Iterator[list[Piece]]:
    """All rows, in lists that have no more bytes than one collective carries, each on one device."""
    bucket: list[Piece] = []
    filled, device = 0, None
    for each in rounded:
        batch, rows, _ = each.sketch.plan.view
        height = max(1, BUCKET_BYTES // each.row_bytes)
        for matrix in range(batch):
            for top in range(0, rows, height):
                where = slice(matrix, matrix + 1), slice(top, min(top + height, rows))
                size = (where[1].stop - top) * each.row_bytes
                if bucket and (filled + size > BUCKET_BYTES or each.stored.buffers[0].device != device):
                    yield bucket
                    bucket, filled = [], 0
                bucket.append((each, where))
                filled, device = filled + size, each.stored.buffers[0].device
    if bucket:
        yield bucket


def _share(where: Block, rank: int, size: int) -> Block:
    """The rows of a piece that one of the ranks sums."""
    matrix, rows = where
    count = rows.stop - rows.start
    return matrix, slice(rows.start + count * rank // size, rows.start + count * (rank + 1) // size)


def _sum_rows(bucket: list[Piece], ranks: Ranks) -> None:
    """Sum one bucket's rows over the ranks."""
    shares = [[(each, _share(where, rank, ranks.size)) for each, where in bucket] for rank in range(ranks.size)]
    own = shares[ranks.rank]
    received = ranks.swap([_packed(share) for share in shares], [_bytes(own)] * ranks.size)
    for each, where, sent in _split(own, received):
        for block, parts in _blocks(each, where, [each.unpack(part, where) for part in sent]):
            each.sketch.set_sum(block, parts, each.stored)
    received = ranks.swap([_packed(own)] * ranks.size, [_bytes(share) for share in shares])
    for rank, share in enumerate(shares):
        if rank != ranks.rank:
            for each, where, (whole,) in _split(share, [received[rank]]):
                each.stored.write(where, each.unpack(whole, where))


def _packed(share: list[Piece]) -> Tensor:
    return torch.cat([part for each, where in share for part in each.pack(where)])


def _bytes(share: list[Piece]) -> int:
    return sum((where[1].stop - where[1].start) * each.row_bytes for each, where in share)


def _split(share: list[Piece], received: list[Tensor]) -> Iterator[tuple[_Rounded, Block, list[Tensor]]]:
    """What came for each piece, of every rank that sent it."""
    first = 0
    for each, where in share:
        last = first + _bytes([(each, where)])
        if last > first:
            yield each, where, [sent[first:last] for sent in received]
        first = last


def _blocks(
    each: _Rounded, where: Block, parts: list[tuple[Tensor, ...]]
) -> Iterator[tuple[Block, list[tuple[Tensor, ...]]]]:
    """A few rows at a time, so that only so many are float32."""
    matrix, rows = where
    height = max(1, SUM_ELEMENTS // each.stored.width)
    for top in range(rows.start, rows.stop, height):
        block = slice(top, min(top + height, rows.stop))
        local = slice(top - rows.start, block.stop - rows.start)
        yield (matrix, block), [tuple(buffer[:, local] for buffer in part) for part in parts]
