"""All-reduce of sketches and windows over processes; sketches are sent in their storage format."""

from collections.abc import Iterator, Sequence
from zlib import crc32

from floragrad.torch.accumulation.entries import ParamEntries
from floragrad.torch.accumulation.packing import PackedSketch, Piece, byte_count, packed, split
from floragrad.torch.accumulation.replicas import check_alike
from floragrad.torch.accumulation.settings import Settings
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.accumulation.window import Window
from floragrad.torch.distributed.collectives import BUCKET_BYTES, Ranks
from floragrad.torch.storage import Block


def all_reduce_window(
    window: Window, entries: ParamEntries, settings: Settings, ranks: Ranks, difference: str = ""
) -> bool:
    """Sum the sketches and the number of micro-batches of a window over all ranks.

    A rank that has had no micro-batch takes part with zeros.

    Args:
        window: This rank's.
        entries: The parameters; their sketches are summed.
        settings: The options of the sketches.
        ranks: The processes that train together.
        difference: Reason why this rank cannot end the window; all ranks stop then.

    Returns:
        False where no rank has had a micro-batch: there is no window to end.

    Raises:
        RuntimeError: The ranks do not train the same, on all of them alike.
        ValueError: Some ranks have given weights and some have not, on all of them alike.
    """
    layout = crc32(repr((settings, [(entry.tensor_id, entry.plan) for entry in entries])).encode())
    said = ranks.all_gather(
        [layout, window.index, window.kept, bool(window.weighted), bool(difference)], entries.device
    )
    if stopped := [rank for rank, each in enumerate(said) if each[4]]:
        raise RuntimeError(difference or f"ranks {stopped} of process_group cannot end the window: see their errors")
    check_alike([each[0] for each in said], "parameters or options of the accumulator (as checksums)")
    begun = [each for each in said if each[2]]
    # A rank without a micro-batch may have dropped fewer windows: nothing of it depends on the index.
    check_alike([each[1] for each in begun], "the number of the window")
    if len({each[3] for each in begun}) > 1:
        raise ValueError(
            f"weights are given on some ranks only ({[bool(each[3]) for each in said]}): give one for every "
            "micro-batch of a window on all ranks, or for none"
        )
    if not begun:
        return False
    window.index, window.weighted = begun[0][1], bool(begun[0][3])
    window.total = sum(each[2] for each in begun)
    sketched = [(entry, entry.sketch) for entry in entries if entry.sketch is not None]
    held = ranks.all_reduce_any([sketch.folds > 0 for _, sketch in sketched], entries.device)
    joined = [each for each, somewhere in zip(sketched, held, strict=True) if somewhere]
    for entry, sketch in joined:
        sketch.fill_zeros(entry.param.device)
    all_reduce_sketches([sketch for _, sketch in joined], window.index, ranks)
    return True


def all_reduce_sketches(sketches: Sequence[GradientSketch], window: int, ranks: Ranks) -> None:
    """Sum sketches and their noise over all ranks, in place; every rank gets the same bits.

    float32 is all-reduced. Low-bit sketches are sent in their storage format: each rank receives its share of the rows
    from all others, sums them in float32, rounds the sums stochastically with bits of its own, and sends them to
    all. A rank sends 2(R − 1)/R times the bytes of the sketches, where an all-reduce of float32 sends as often four
    bytes for every element. Every rounding is unbiased, so the sum is.

    Args:
        sketches: The same on all ranks and in the same order, each holding a gradient or zeros.
        window: Which window; the rounding of the sums is drawn for it.
        ranks: The processes.
    """
    all_reduce_rounded(sketches, window, ranks)
    kept = {"float32": "data"}  # low-bit data are summed already, their noise is not
    ranks.all_reduce_([each.buffers[kept.get(each.plan.state_dtype, "noise")] for each in sketches])


def all_reduce_rounded(sketches: Sequence[GradientSketch], window: int, ranks: Ranks) -> None:
    """Sum the low-bit sketches alone over all ranks, without their noise."""
    rounded = [
        PackedSketch(each, each.stored_for_sum(window)) for each in sketches if each.plan.state_dtype != "float32"
    ]
    for bucket in _buckets(rounded):
        _sum_rows(bucket, ranks)


def _buckets(rounded: Sequence[PackedSketch]) -> Iterator[list[Piece]]:
    """Yield all rows in buckets of at most ``BUCKET_BYTES``, each on one device."""
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
    """Return the rows of a piece that one of the ranks sums."""
    matrix, rows = where
    count = rows.stop - rows.start
    return matrix, slice(rows.start + count * rank // size, rows.start + count * (rank + 1) // size)


def _sum_rows(bucket: list[Piece], ranks: Ranks) -> None:
    """Sum one bucket's rows over the ranks."""
    shares = [[(each, _share(where, rank, ranks.size)) for each, where in bucket] for rank in range(ranks.size)]
    local, device = shares[ranks.rank], bucket[0][0].stored.buffers[0].device
    received = ranks.all_to_all([packed(share, device) for share in shares], [byte_count(local)] * ranks.size)
    for each, where, sent in split(local, received):
        each.write_sum(where, sent)
    received = ranks.all_to_all([packed(local, device)] * ranks.size, [byte_count(share) for share in shares])
    for rank, share in enumerate(shares):
        if rank != ranks.rank:
            for each, where, (whole,) in split(share, [received[rank]]):
                each.stored.write(where, each.unpack(whole, where))
