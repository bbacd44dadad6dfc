"""Second pass: the size of the step, ‖D‖²; nothing is written but its partial sums."""

import triton
import triton.language as tl

from floragrad.torch.backends.triton.kernels import fields
from floragrad.torch.backends.triton.kernels.fields import region
from floragrad.torch.backends.triton.kernels.storage import load_rows
from floragrad.torch.backends.triton.kernels.tile import (
    NONE,
    SKETCH,
    bucket_sizes,
    column_vectors,
    columns_of,
    direction_of,
    operands,
    scaled_gradient,
)


@triton.jit
def direction(
    table: tl.tensor,
    workspace: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    all_rows: tl.tensor,
    pieces: tl.tensor,
    floor: tl.tensor,
    row_programs: tl.tensor,
    beta1: tl.tensor,
    fresh: tl.tensor,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FACTORED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    BUCKETS: tl.constexpr,
) -> None:
    """Write ‖D‖² of every ``row_programs``-th tile of rows of some buckets.

    Grid: programs of rows x blocks of buckets, matrices, tensors.
    """
    blocks = tl.cdiv(width, BUCKETS)
    program, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    matrix, tensor = tl.program_id(1), tl.program_id(2)
    SIGNED: tl.constexpr = MOMENTUM == SKETCH and FACTORED and not ADAPTIVE and not RESAMPLES
    grad, data, scale, row_var, variance, root = operands(
        table, workspace, tensor, matrix, pieces, all_rows, floor, GRAD, STATE, MOMENTUM != NONE, FACTORED, ALIGNED
    )
    bucket = block * BUCKETS + tl.arange(0, BUCKETS)
    column, in_columns = columns_of(bucket, width, columns, SLICES)
    factor, weight, old = column_vectors(
        table,
        workspace,
        tensor,
        matrix,
        column,
        in_columns,
        columns,
        FACTORED,
        SIGNED,
        ADAPTIVE,
        RESAMPLES,
        SLICES,
        ALIGNED,
    )
    sizes = bucket_sizes(bucket, width, columns, ADAPTIVE)
    square = 0.0
    for top in range(program * ROWS, rows, row_programs * ROWS):
        lane = top + tl.arange(0, ROWS)
        in_rows, row = lane < rows, (matrix * rows + lane).to(tl.int64)
        v, r = scaled_gradient(
            grad, variance, row_var, row, in_rows, column, in_columns, columns, factor, root, FACTORED
        )
        kept = tl.zeros([ROWS, BUCKETS], tl.float32)
        if MOMENTUM != NONE:
            kept = load_rows(data, scale, row, block * BUCKETS, width, in_rows, STATE, ROWS, BUCKETS)
        d, _ = direction_of(v, r, kept, factor, weight, old, sizes, beta1, fresh, MOMENTUM, SIGNED, RESIDUAL, RESAMPLES)
        in_tile = in_rows[:, None, None] & in_columns[None, :, :]
        square += tl.sum(tl.where(in_tile, d * d, 0.0))
    squares = region(workspace, table, tensor, fields.SQUARES) + matrix * tl.num_programs(0) + tl.program_id(0)
    tl.store(squares, square)
