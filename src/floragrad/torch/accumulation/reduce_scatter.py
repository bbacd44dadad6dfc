"""Reduce-scatter of sketches: each process sends its sketches of whole tensors, and receives the sums of its shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from floragrad.torch.accumulation.packing import PackedSketch, Piece, byte_count, packed, split
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.distributed.collectives import BUCKET_BYTES, Ranks
from floragrad.torch.storage import Block


@dataclass(frozen=True)
class ScatteredSketch:
    """Sketch of this process's gradients of a whole tensor, and the sketch of the sum's local shard.

    Attributes:
        whole: Of the whole tensor.
        shard: Of the local shard, on dimension 0.
        bounds: First row, over all matrices, of each rank's shard, and the number of rows.
        rank: This process.
    """

    whole: GradientSketch
    shard: GradientSketch
    bounds: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, whole: GradientSketch, shard: GradientSketch, ranks: Ranks) -> "ScatteredSketch":
        """Return the pair for a tensor that is split on dimension 0 as ``torch.chunk`` does."""
        size = whole.plan.shape[0]
        chunk = ceil(size / ranks.size)
        view = whole.plan.view
        height = view.batch * view.rows // size if size else 0
        bounds = tuple(min(rank * chunk, size) * height for rank in range(ranks.size + 1))
        return cls(whole, shard, bounds, ranks.rank)

    @property
    def matrices(self) -> slice:
        """The matrices that the local shard has rows of."""
        batch, rows, _ = self.whole.plan.view
        count = self.shard.plan.view.batch
        first = min(self.bounds[self.rank] // rows if rows else 0, batch - count)
        return slice(first, first + count)

    def all_columns(self) -> None:
        """Write the local share of the columns' mean squares to the whole: a sum over the ranks completes them."""
        whole, shard = self.whole.buffers["col_var"], self.shard.buffers["col_var"]
        share = self.shard.plan.view.rows / max(1, self.whole.plan.view.rows)
        whole.zero_()[self.matrices] = share * shard.to(whole.device)


def reduce_scatter_sketches(scattered: Sequence[ScatteredSketch], window: int, ranks: Ranks) -> None:
    """Sum sketches of whole tensors over the ranks, each rank its shards.

    They are sent in their storage format; sums are float32 and rounded once, unbiased. A rank sends (R − 1)/R times the
    bytes of its sketches.

    Args:
        scattered: The same tensors on all ranks and in the same order, each with a gradient or zeros.
        window: Index of the window; the rounding of the sums is drawn for it.
        ranks: The processes that share the tensors.
    """
    for each in scattered:
        each.shard.begin_sum(each.whole, each.matrices)
    for bucket in _buckets(scattered):
        _exchange(bucket, window, ranks)


_Portion = tuple[ScatteredSketch, int, int]
"""The k-th of n portions of every rank's rows of a tensor."""


def _buckets(scattered: Sequence[ScatteredSketch]) -> Iterator[list[_Portion]]:
    """Yield portions of at most ``BUCKET_BYTES``, each on one device, to which all ranks contribute alike."""
    bucket: list[_Portion] = []
    filled, device = 0, None
    for each in scattered:
        data = each.whole.buffers["data"]
        total = each.bounds[-1] * PackedSketch(each.whole, each.whole.stored()).row_bytes
        count = max(1, ceil(total / BUCKET_BYTES))
        for portion in range(count):
            if bucket and (filled + total / count > BUCKET_BYTES or data.device != device):
                yield bucket
                bucket, filled = [], 0
            bucket.append((each, portion, count))
            filled, device = filled + ceil(total / count), data.device
    if bucket:
        yield bucket


def _exchange(bucket: list[_Portion], window: int, ranks: Ranks) -> None:
    shares: list[list[Piece]] = [[] for _ in range(ranks.size)]
    own: list[Piece] = []
    for each, portion, count in bucket:
        whole = PackedSketch(each.whole, each.whole.stored())
        shard = PackedSketch(each.shard, each.shard.stored_for_sum(window, partial=True))
        for rank, share in enumerate(shares):
            start, rows = each.bounds[rank], each.bounds[rank + 1] - each.bounds[rank]
            first, last = start + rows * portion // count, start + rows * (portion + 1) // count
            share += [(whole, where) for where in _row_ranges(first, last, each.whole.plan.view.rows)]
            if rank == ranks.rank:
                local = each.shard.plan.view.rows
                own += [(shard, where) for where in _row_ranges(first - start, last - start, local)]
    device = bucket[0][0].whole.buffers["data"].device
    received = ranks.all_to_all([packed(share, device) for share in shares], [byte_count(own)] * ranks.size)
    for target, where, sent in split(own, received):
        target.write_sum(where, sent)


def _row_ranges(first: int, last: int, rows: int) -> Iterator[Block]:
    """Yield a range of rows over all matrices, one matrix at a time."""
    while first < last:
        matrix, top = divmod(first, rows)
        stop = min(last - matrix * rows, rows)
        yield slice(matrix, matrix + 1), slice(top, stop)
        first = matrix * rows + stop
