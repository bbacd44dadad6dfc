"""Between the first two passes: averages of the sums, the factors that make U of G, and all that is drawn.

U = R · (G · C) with R = root / sqrt(row_var) for each row and C = 2³⁶ / sqrt(col_var) for each column;
``docs/method.md`` says why 2³⁶, and why the mean of the rows is bounded.
"""

from typing import Final

import triton
import triton.language as tl

from floragrad.torch.backends.triton.kernels import draws, fields
from floragrad.torch.backends.triton.kernels.fields import address, field, ordered_sum, region, words_in
from floragrad.torch.update import BALANCE, LARGEST_FLOAT, LARGEST_MEAN

_BALANCE: Final = tl.constexpr(BALANCE)
_LARGEST_MEAN: Final = tl.constexpr(LARGEST_MEAN)
_LARGEST_FLOAT: Final = tl.constexpr(LARGEST_FLOAT)


@triton.jit
def saturated(average: tl.tensor) -> tl.tensor:
    """Make averages finite that squares beyond float32 have made infinite, so that fresh ones can pull them down."""
    return tl.where(average > _LARGEST_FLOAT, _LARGEST_FLOAT, average)


@triton.jit
def row_root(totals: tl.tensor, pieces: tl.tensor, all_rows: tl.tensor, floor: tl.tensor) -> tl.tensor:
    """Return sqrt(mean(row_var)) / 2³⁶ of one matrix, of the sums over pieces of its rows; ``floor`` is (1 − β₂) ε₁."""
    mean = ordered_sum(totals, pieces) / all_rows + floor
    return tl.sqrt_rn(tl.where(mean > _LARGEST_MEAN, _LARGEST_MEAN, mean)) * (1.0 / _BALANCE)


@triton.jit
def row_factors(root: tl.tensor, row_var: tl.tensor) -> tl.tensor:
    """Return R."""
    return root * tl.rsqrt(row_var)


@triton.jit
def average_rows(
    table: tl.tensor,
    workspace: tl.tensor,
    tensor: tl.tensor,
    matrix: tl.tensor,
    piece: tl.tensor,
    batch: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    column_tiles: tl.tensor,
    pieces: tl.tensor,
    beta2: tl.tensor,
    fresh2: tl.tensor,
    eps: tl.tensor,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Average one piece of a matrix's rows, and write their total without the share of ε₁."""
    sums = region(workspace, table, tensor, fields.ROW_PARTIALS) + matrix * rows
    averages = address(table, tensor, fields.ROW_VAR, tl.float32, ALIGNED) + matrix * rows
    totals = tl.zeros([BLOCK], tl.float32)
    piece_rows = tl.cdiv(tl.cdiv(rows, pieces), BLOCK) * BLOCK
    for top in range(piece * piece_rows, min((piece + 1) * piece_rows, rows), BLOCK):
        row = top + tl.arange(0, BLOCK)
        there = row < rows
        fresh = tl.zeros([BLOCK], tl.float32)
        for tile in range(0, column_tiles):
            fresh += tl.load(sums + tile * batch * rows + row, mask=there, other=0.0)
        old = saturated(tl.load(averages + row, mask=there, other=0.0))
        moved = old * beta2 + fresh / columns * fresh2
        tl.store(averages + row, saturated(moved + eps * fresh2), mask=there)
        totals += tl.where(there, moved, 0.0)
    tl.store(region(workspace, table, tensor, fields.ROW_TOTALS) + matrix * pieces + piece, tl.sum(totals))


@triton.jit
def sum_chunks(
    first: tl.tensor, chunks: tl.tensor, columns: tl.tensor, column: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Sum up (chunks, columns) along the first, sixteen loads at a time."""
    sums = tl.zeros([16, BLOCK], tl.float32)
    for top in range(0, chunks, 16):
        chunk = top + tl.arange(0, 16)
        there = (chunk < chunks)[:, None] & (column < columns)[None, :]
        sums += tl.load(first + chunk[:, None] * columns + column[None, :], mask=there, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def column_factors(
    table: tl.tensor,
    workspace: tl.tensor,
    tensor: tl.tensor,
    matrix: tl.tensor,
    column: tl.tensor,
    sums: tl.tensor,
    all_rows: tl.tensor,
    columns: tl.tensor,
    beta2: tl.tensor,
    fresh2: tl.tensor,
    eps: tl.tensor,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Average some columns, and write C, ``SIGNED`` times the projection's signs."""
    there = column < columns
    averages = address(table, tensor, fields.COL_VAR, tl.float32, ALIGNED) + matrix * columns + column
    old = saturated(tl.load(averages, mask=there, other=0.0))
    new = old * beta2 + (sums / all_rows + eps) * fresh2
    tl.store(averages, saturated(new), mask=there)
    factors = tl.div_rn(tl.full(new.shape, _BALANCE, tl.float32), tl.sqrt_rn(new))  # 0 where squares overflow
    if SIGNED:
        seed, tensor_id = field(table, tensor, fields.SEED), field(table, tensor, fields.TENSOR_ID)
        factors *= draws.random_signs(
            seed, tensor_id, field(table, tensor, fields.RESAMPLE_INDEX), draws.MOMENTUM, column
        )
    tl.store(region(workspace, table, tensor, fields.FACTORS) + matrix * columns + column, factors, mask=there)


@triton.jit
def draw_for_rows(
    table: tl.tensor,
    workspace: tl.tensor,
    tensor: tl.tensor,
    row: tl.tensor,
    count: tl.tensor,
    rows: tl.tensor,
    all_rows: tl.tensor,
    ROUNDS_STATE: tl.constexpr,
    ROUNDS_PARAM: tl.constexpr,
) -> None:
    """Draw the words of some rows, which are counted through all matrices."""
    seed, tensor_id = field(table, tensor, fields.SEED), field(table, tensor, fields.TENSOR_ID)
    step = field(table, tensor, fields.STEP)
    position = field(table, tensor, fields.FIRST_ROW) + (row // rows).to(tl.int64) * all_rows + row % rows
    if ROUNDS_STATE:
        words = draws.rounding_words(seed, tensor_id, step, draws.STATE_ROUNDING, position)
        tl.store(words_in(region(workspace, table, tensor, fields.STATE_ROWS)) + row, words, mask=row < count)
    if ROUNDS_PARAM:
        words = draws.rounding_words(seed, tensor_id, step, draws.PARAMETER_ROUNDING, position)
        tl.store(words_in(region(workspace, table, tensor, fields.PARAM_ROWS)) + row, words, mask=row < count)


@triton.jit
def draw_for_columns(
    table: tl.tensor,
    workspace: tl.tensor,
    tensor: tl.tensor,
    column: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    ROUNDS_STATE: tl.constexpr,
    ROUNDS_PARAM: tl.constexpr,
    SIGNS: tl.constexpr,
    OLD_SIGNS: tl.constexpr,
) -> None:
    """Draw words and signs of some columns."""
    seed, tensor_id = field(table, tensor, fields.SEED), field(table, tensor, fields.TENSOR_ID)
    step, resample_index = field(table, tensor, fields.STEP), field(table, tensor, fields.RESAMPLE_INDEX)
    position = field(table, tensor, fields.FIRST_COLUMN) + column
    if ROUNDS_STATE:
        words = draws.rounding_words(seed, tensor_id, step, draws.STATE_ROUNDING, position)
        where = words_in(region(workspace, table, tensor, fields.STATE_COLUMNS)) + column
        tl.store(where, words, mask=column < width)
    if ROUNDS_PARAM:
        words = draws.rounding_words(seed, tensor_id, step, draws.PARAMETER_ROUNDING, position)
        where = words_in(region(workspace, table, tensor, fields.PARAM_COLUMNS)) + column
        tl.store(where, words, mask=column < columns)
    if SIGNS:
        signs = draws.random_signs(seed, tensor_id, resample_index, draws.MOMENTUM, column)
        tl.store(region(workspace, table, tensor, fields.SIGNS) + column, signs, mask=column < columns)
    if OLD_SIGNS:
        signs = draws.random_signs(seed, tensor_id, resample_index - 1, draws.MOMENTUM, column)
        tl.store(region(workspace, table, tensor, fields.OLD_SIGNS) + column, signs, mask=column < columns)


@triton.jit
def scales(
    table: tl.tensor,
    workspace: tl.tensor,
    batch: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    all_rows: tl.tensor,
    chunks: tl.tensor,
    column_tiles: tl.tensor,
    pieces: tl.tensor,
    beta2: tl.tensor,
    fresh2: tl.tensor,
    eps: tl.tensor,
    FACTORED: tl.constexpr,
    SUMS_ONLY: tl.constexpr,
    SIGNED: tl.constexpr,
    ROUNDS_STATE: tl.constexpr,
    ROUNDS_PARAM: tl.constexpr,
    SIGNS: tl.constexpr,
    OLD_SIGNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Average rows and columns, write the columns' factors, draw words and signs: a share of one of these each.

    ``SUMS_ONLY`` leaves the columns' sums to be added up over shards, for :func:`factors` to go on with.

    Grid: programs of columns, pieces of rows, draws for columns, draws for rows, in this order; tensors.
    """
    program, tensor = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    blocks = tl.cdiv(columns, BLOCK)
    of_columns = batch * blocks if FACTORED else 0
    of_rows = batch * pieces if FACTORED else 0
    if program < of_columns:
        matrix, column = program // blocks, program % blocks * BLOCK + lanes
        partials = region(workspace, table, tensor, fields.COL_PARTIALS) + matrix * chunks * columns
        sums = sum_chunks(partials, chunks, columns, column, BLOCK)
        if SUMS_ONLY:
            where = region(workspace, table, tensor, fields.COL_SUMS) + matrix * columns + column
            tl.store(where, sums, mask=column < columns)
        else:
            column_factors(
                table, workspace, tensor, matrix, column, sums, all_rows, columns, beta2, fresh2, eps, SIGNED, ALIGNED
            )
    elif program < of_columns + of_rows:
        matrix, piece = (program - of_columns) // pieces, (program - of_columns) % pieces
        average_rows(
            table,
            workspace,
            tensor,
            matrix,
            piece,
            batch,
            rows,
            columns,
            column_tiles,
            pieces,
            beta2,
            fresh2,
            eps,
            ALIGNED,
            BLOCK,
        )
    elif program < of_columns + of_rows + blocks:
        column = (program - of_columns - of_rows) * BLOCK + lanes
        draw_for_columns(table, workspace, tensor, column, columns, width, ROUNDS_STATE, ROUNDS_PARAM, SIGNS, OLD_SIGNS)
    else:
        row = (program - of_columns - of_rows - blocks) * BLOCK + lanes
        draw_for_rows(table, workspace, tensor, row, batch * rows, rows, all_rows, ROUNDS_STATE, ROUNDS_PARAM)


@triton.jit
def factors(
    table: tl.tensor,
    workspace: tl.tensor,
    columns: tl.tensor,
    all_rows: tl.tensor,
    beta2: tl.tensor,
    fresh2: tl.tensor,
    eps: tl.tensor,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Average columns and write their factors, of sums that have been added up over shards.

    Grid: blocks of columns, matrices, tensors.
    """
    matrix, tensor = tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = region(workspace, table, tensor, fields.COL_SUMS) + matrix * columns
    fresh = tl.load(sums + column, mask=column < columns, other=0.0)
    column_factors(
        table, workspace, tensor, matrix, column, fresh, all_rows, columns, beta2, fresh2, eps, SIGNED, ALIGNED
    )
