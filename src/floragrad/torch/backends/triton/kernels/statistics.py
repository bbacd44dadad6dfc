"""First pass: sums of G² along rows and columns, or the whole second moment."""

import triton
import triton.language as tl

from floragrad.torch.backends.triton.kernels import fields
from floragrad.torch.backends.triton.kernels.fields import address, region
from floragrad.torch.backends.triton.kernels.scales import saturated


@triton.jit
def square_sums(
    table: tl.tensor,
    workspace: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    chunks: tl.tensor,
    chunk_rows: tl.tensor,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    MEASURES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write the row and column sums of G² of a chunk of rows and a tile of columns; ``MEASURES``: the sum of W² too.

    Grid: chunks x tiles of columns, matrices, tensors. No two programs write to one place, so nothing depends on
    their order.
    """
    tiles = tl.cdiv(columns, COLUMNS)
    chunk, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    matrix, tensor = tl.program_id(1), tl.program_id(2)
    grad = address(table, tensor, fields.GRAD, GRAD, ALIGNED)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < columns
    row_sums = region(workspace, table, tensor, fields.ROW_PARTIALS) + (tile * tl.num_programs(1) + matrix) * rows
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    norm = 0.0
    for top in range(chunk * chunk_rows, min((chunk + 1) * chunk_rows, rows), ROWS):
        row = top + tl.arange(0, ROWS)
        in_tile = (row < rows)[:, None] & in_columns[None, :]
        first = (matrix * rows + row).to(tl.int64) * columns
        g = tl.load(grad + first[:, None] + column[None, :], mask=in_tile, other=0.0).to(tl.float32)
        squares = g * g
        sums += squares
        tl.store(row_sums + row, tl.sum(squares, 1), mask=row < rows)
        if MEASURES:
            params = address(table, tensor, fields.PARAM, PARAM, ALIGNED) + first[:, None] + column[None, :]
            w = tl.load(params, mask=in_tile, other=0.0).to(tl.float32)
            norm += tl.sum(w * w)
    col_sums = region(workspace, table, tensor, fields.COL_PARTIALS) + (matrix * chunks + chunk) * columns
    tl.store(col_sums + column, tl.sum(sums, 0), mask=in_columns)
    if MEASURES:
        program = matrix * tl.num_programs(0) + tl.program_id(0)
        tl.store(region(workspace, table, tensor, fields.PARAM_SQUARES) + program, norm)


@triton.jit
def variance(
    table: tl.tensor,
    workspace: tl.tensor,
    count: tl.tensor,
    beta2: tl.tensor,
    fresh2: tl.tensor,
    eps: tl.tensor,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    MEASURES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """V ← β₂ V + (1 − β₂)(G² + ε), an average for every element; ``MEASURES``: sum up W² too.

    Grid: programs, each of which takes blocks of elements one after the other; tensors.
    """
    tensor = tl.program_id(1)
    grad = address(table, tensor, fields.GRAD, GRAD, ALIGNED)
    param = address(table, tensor, fields.PARAM, PARAM, ALIGNED)
    averages = address(table, tensor, fields.VARIANCE, tl.float32, ALIGNED)
    norm = 0.0
    for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        where = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        there = where < count
        g = tl.load(grad + where, mask=there, other=0.0).to(tl.float32)
        old = saturated(tl.load(averages + where, mask=there, other=0.0))
        tl.store(averages + where, old * beta2 + (g * g + eps) * fresh2, mask=there)
        if MEASURES:
            w = tl.load(param + where, mask=there, other=0.0).to(tl.float32)
            norm += tl.sum(w * w)
    if MEASURES:
        tl.store(region(workspace, table, tensor, fields.PARAM_SQUARES) + tl.program_id(0), norm)
