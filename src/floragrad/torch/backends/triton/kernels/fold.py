"""The accumulator's sketch of a sum of gradients: fold one in, and decode."""

import triton
import triton.language as tl

from floragrad.torch.backends.triton.kernels import draws
from floragrad.torch.backends.triton.kernels.fields import ordered_sum
from floragrad.torch.backends.triton.kernels.storage import (
    FLOAT32,
    INT4,
    cut_to_bfloat16,
    load_rows,
    nearest_noise,
    store_rows,
)
from floragrad.torch.backends.triton.kernels.tile import bucket_sizes, columns_of


@triton.jit(do_not_specialize=["seed", "tensor_id", "window", "counter"])
def fold(
    grad: tl.tensor,
    data: tl.tensor,
    scale: tl.tensor,
    column_sizes: tl.tensor,
    errors: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    row_programs: tl.tensor,
    first_row: tl.tensor,
    matrix_rows: tl.tensor,
    row_words: tl.tensor,
    weight: tl.tensor,
    seed: tl.tensor,
    tensor_id: tl.tensor,
    window: tl.tensor,
    counter: tl.tensor,
    STATE: tl.constexpr,
    IS_FIRST: tl.constexpr,
    DIVIDES: tl.constexpr,
    MEASURES: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    BUCKETS: tl.constexpr,
) -> None:
    """C ← C + w · encode(G) of every ``row_programs``-th tile of rows of some buckets.

    Where nothing is projected, ``DIVIDES`` divides columns by their sizes first. ``MEASURES`` writes the squared error
    of rounding, of columns in their own size.

    Grid: programs of rows x blocks of buckets, matrices.
    """
    blocks = tl.cdiv(width, BUCKETS)
    program, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    matrix = tl.program_id(1)
    payload = data.to(tl.pointer_type(tl.int8)) if STATE == INT4 else data
    bucket = block * BUCKETS + tl.arange(0, BUCKETS)
    column, in_columns = columns_of(bucket, width, columns, SLICES)
    signs = tl.full([SLICES, BUCKETS], 1.0, tl.float32)
    if SLICES > 1:
        first = tl.arange(0, SLICES) * width + block * BUCKETS
        signs = draws.slice_signs(seed, tensor_id, window, draws.ACCUMULATOR, first, BUCKETS)
    column_word = bucket
    if STATE != FLOAT32:
        column_word = draws.rounding_words(seed, tensor_id, counter, draws.ACCUMULATOR_ROUNDING, row_words + bucket)
    sizes = tl.full([BUCKETS], 1.0, tl.float32)
    if DIVIDES:
        sizes = tl.load(column_sizes + matrix * columns + bucket, mask=bucket < width, other=1.0)
    error = 0.0
    for top in range(program * ROWS, rows, row_programs * ROWS):
        lane = top + tl.arange(0, ROWS)
        in_rows, row = lane < rows, (matrix * rows + lane).to(tl.int64)
        in_tile = in_rows[:, None, None] & in_columns[None, :, :]
        where = (row * columns)[:, None, None] + column[None, :, :]
        g = tl.load(grad + where, mask=in_tile, other=0.0).to(tl.float32)
        fresh = tl.sum(g * signs[None, :, :], 1)
        if DIVIDES:
            fresh = tl.div_rn(fresh, tl.broadcast_to(sizes[None, :], fresh.shape))
        total = fresh * weight
        if not IS_FIRST:
            total += load_rows(payload, scale, row, block * BUCKETS, width, in_rows, STATE, ROWS, BUCKETS)
        bits = tl.zeros([ROWS, BUCKETS], tl.int32)
        if STATE != FLOAT32:
            position = first_row + matrix.to(tl.int64) * matrix_rows + lane
            row_word = draws.rounding_words(seed, tensor_id, counter, draws.ACCUMULATOR_ROUNDING, position)
            bits = draws.rounding_bits(row_word[:, None], column_word[None, :])
        kept = store_rows(total, payload, scale, row, block * BUCKETS, width, in_rows, bits, STATE, ROWS, BUCKETS)
        if MEASURES:
            difference = tl.where(in_rows[:, None] & (bucket < width)[None, :], (kept - total) * sizes[None, :], 0.0)
            error += tl.sum(difference * difference)
    if MEASURES:
        tl.store(errors + matrix * tl.num_programs(0) + tl.program_id(0), error)


@triton.jit
def add_errors(noise: tl.tensor, errors: tl.tensor, count: tl.tensor) -> None:
    """Add the squared errors of all programs to the noise. Grid: one program."""
    tl.store(noise, tl.load(noise) + ordered_sum(errors, count))


@triton.jit(do_not_specialize=["seed", "tensor_id", "window"])
def decode(
    grad: tl.tensor,
    data: tl.tensor,
    scale: tl.tensor,
    column_sizes: tl.tensor,
    squares: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    row_programs: tl.tensor,
    grad_weight: tl.tensor,
    factor: tl.tensor,
    seed: tl.tensor,
    tensor_id: tl.tensor,
    window: tl.tensor,
    ROUNDS: tl.constexpr,
    STATE: tl.constexpr,
    READS_GRAD: tl.constexpr,
    READS_FACTOR: tl.constexpr,
    ORTHOGONAL: tl.constexpr,
    MULTIPLIES: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    BUCKETS: tl.constexpr,
) -> None:
    """Replace G by the scaled sum of grad_weight · G and the decoded sketch, in every ``row_programs``-th tile of rows.

    ``ORTHOGONAL`` decodes with (P Pᵀ)⁻¹ P. Where nothing is projected, ``MULTIPLIES`` multiplies columns by their
    sizes, and writes the sums of squares along them, before the factor. ``READS_GRAD``: whether G is read;
    ``ROUNDS``: whether it is bfloat16.

    Grid: programs of rows x blocks of buckets, matrices.
    """
    blocks = tl.cdiv(width, BUCKETS)
    program, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    matrix = tl.program_id(1)
    payload = data.to(tl.pointer_type(tl.int8)) if STATE == INT4 else data
    bucket = block * BUCKETS + tl.arange(0, BUCKETS)
    column, in_columns = columns_of(bucket, width, columns, SLICES)
    weight = tl.full([SLICES, BUCKETS], 1.0, tl.float32)
    if SLICES > 1:
        first = tl.arange(0, SLICES) * width + block * BUCKETS
        weight = draws.slice_signs(seed, tensor_id, window, draws.ACCUMULATOR, first, BUCKETS)
        if ORTHOGONAL:
            weight = tl.div_rn(
                weight, tl.broadcast_to(bucket_sizes(bucket, width, columns, False)[None, :], weight.shape)
            )
    if MULTIPLIES:
        sizes = tl.load(column_sizes + matrix * columns + bucket, mask=bucket < width, other=1.0)
        weight = weight * sizes[None, :]
    by = tl.load(factor).to(tl.float32) if READS_FACTOR else factor
    sums = tl.zeros([BUCKETS], tl.float32)
    for top in range(program * ROWS, rows, row_programs * ROWS):
        lane = top + tl.arange(0, ROWS)
        in_rows, row = lane < rows, (matrix * rows + lane).to(tl.int64)
        in_tile = in_rows[:, None, None] & in_columns[None, :, :]
        where = grad + (row * columns)[:, None, None] + column[None, :, :]
        kept = load_rows(payload, scale, row, block * BUCKETS, width, in_rows, STATE, ROWS, BUCKETS)
        decoded = kept[:, None, :] * weight[None, :, :]
        if READS_GRAD:
            decoded += tl.load(where, mask=in_tile, other=0.0).to(tl.float32) * grad_weight
        if MULTIPLIES:
            sums += tl.sum(tl.sum(tl.where(in_tile, decoded * decoded, 0.0), 1), 0)
        result = decoded * by
        if ROUNDS:
            tl.store(where, cut_to_bfloat16(result, nearest_noise(result)), mask=in_tile)
        else:
            tl.store(where, result.to(where.dtype.element_ty), mask=in_tile)
    if MULTIPLIES:
        partials = squares + (matrix * row_programs + program) * columns
        tl.store(partials + bucket, sums, mask=bucket < width)
