"""Storage formats of rows: float32, bfloat16, int8 or int4 with a scale for each block of 64 columns.

The formats are those of ``floragrad.torch.storage``; in a byte of int4 the low half holds column 2j, the high one
column 2j + 1.
"""

from typing import Final

import triton
import triton.language as tl

FLOAT32: Final = tl.constexpr(0)
BFLOAT16: Final = tl.constexpr(1)
INT8: Final = tl.constexpr(2)
INT4: Final = tl.constexpr(3)

QUANTIZATION_BLOCK: Final = tl.constexpr(64)


@triton.jit
def magnitude(values: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """Return the largest absolute value along an axis: NaN where there is one, as bits of floats are in their order."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis).to(tl.float32, bitcast=True)


@triton.jit
def spread(scale: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Repeat the number of each block for its columns: (rows, blocks) to (rows, columns)."""
    return tl.reshape(tl.broadcast_to(scale[:, :, None], (ROWS, COLUMNS // BLOCK, BLOCK)), (ROWS, COLUMNS))


@triton.jit
def load_rows(
    data: tl.tensor,
    scale: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    in_rows: tl.tensor,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Return a float32 tile of stored rows, zeros beyond them.

    Args:
        data: The payload; int8 where it is low-bit.
        scale: Of each block of 64 columns.
        row: int64, (ROWS,).
        first: The first column, a multiple of COLUMNS.
        width: Columns of a row.
        in_rows: Which rows there are, (ROWS,).
        DTYPE: How they are stored.
        ROWS: Of the tile.
        COLUMNS: A multiple of 64, or all columns; even.
    """
    column = first + tl.arange(0, COLUMNS)
    in_tile = in_rows[:, None] & (column < width)[None, :]
    if DTYPE == INT4:
        byte = first // 2 + tl.arange(0, COLUMNS // 2)
        row_bytes = (width + 1) // 2
        in_bytes = in_rows[:, None] & (byte < row_bytes)[None, :]
        pairs = tl.load(data + row[:, None] * row_bytes + byte[None, :], mask=in_bytes, other=0)
        # A shift to the left and back extends the sign of the low half.
        values = tl.reshape(tl.join((pairs << 4) >> 4, pairs >> 4), (ROWS, COLUMNS)).to(tl.float32)
    else:
        values = tl.load(data + row[:, None] * width + column[None, :], mask=in_tile, other=0).to(tl.float32)
    if DTYPE == INT8 or DTYPE == INT4:
        BLOCK: tl.constexpr = min(COLUMNS, QUANTIZATION_BLOCK)
        block = first // QUANTIZATION_BLOCK + tl.arange(0, COLUMNS // BLOCK)
        blocks = tl.cdiv(width, QUANTIZATION_BLOCK)
        in_blocks = in_rows[:, None] & (block < blocks)[None, :]
        scales = tl.load(scale + row[:, None] * blocks + block[None, :], mask=in_blocks, other=0.0)
        values = values * spread(scales, ROWS, COLUMNS, BLOCK)
    return values


@triton.jit
def store_rows(
    values: tl.tensor,
    data: tl.tensor,
    scale: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    in_rows: tl.tensor,
    bits: tl.tensor,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Store a tile, rounded stochastically, and return the stored values: q = ⌊x / scale + u⌋, of mean x / scale.

    Args:
        values: float32, zeros beyond the rows' columns.
        data: As in :func:`load_rows`, and so are the others.
        scale: Of each block.
        row: int64.
        first: The first column.
        width: Columns of a row.
        in_rows: Which rows there are.
        bits: Random bits of each element, from :func:`rounding_bits`; not used for float32.
        DTYPE: How the rows are stored.
        ROWS: Of the tile.
        COLUMNS: As in :func:`load_rows`.
    """
    column = first + tl.arange(0, COLUMNS)
    in_tile = in_rows[:, None] & (column < width)[None, :]
    where = data + row[:, None] * width + column[None, :]
    kept = values
    if DTYPE == FLOAT32:
        tl.store(where, values, mask=in_tile)
    elif DTYPE == BFLOAT16:
        rounded = cut_to_bfloat16(values, bits & 0xFFFF)
        tl.store(where, rounded, mask=in_tile)
        kept = rounded.to(tl.float32)
    else:
        LARGEST: tl.constexpr = 127.0 if DTYPE == INT8 else 7.0
        BLOCK: tl.constexpr = min(COLUMNS, QUANTIZATION_BLOCK)
        most = magnitude(tl.reshape(values, (ROWS, COLUMNS // BLOCK, BLOCK)), 2)
        scales = tl.div_rn(most, tl.full(most.shape, LARGEST, tl.float32))
        block = first // QUANTIZATION_BLOCK + tl.arange(0, COLUMNS // BLOCK)
        blocks = tl.cdiv(width, QUANTIZATION_BLOCK)
        in_blocks = in_rows[:, None] & (block < blocks)[None, :]
        tl.store(scale + row[:, None] * blocks + block[None, :], scales, mask=in_blocks)
        # A block of zeros has scale 0: divide it by 1 instead.
        divisor = spread(tl.where(scales == 0.0, 1.0, scales), ROWS, COLUMNS, BLOCK)
        grid = tl.div_rn(values, divisor) + (bits.to(tl.float32) + 32768.5) * 0.0000152587890625
        grid = tl.where(grid > -LARGEST, grid, -LARGEST)  # NaN too
        integers = tl.floor(tl.where(grid < LARGEST, grid, LARGEST)).to(tl.int8)
        kept = integers.to(tl.float32) * spread(scales, ROWS, COLUMNS, BLOCK)
        if DTYPE == INT8:
            tl.store(where, integers, mask=in_tile)
        else:
            low, high = tl.split(tl.reshape(integers, (ROWS, COLUMNS // 2, 2)))
            byte = first // 2 + tl.arange(0, COLUMNS // 2)
            row_bytes = (width + 1) // 2
            in_bytes = in_rows[:, None] & (byte < row_bytes)[None, :]
            tl.store(data + row[:, None] * row_bytes + byte[None, :], (low & 15) | (high << 4), mask=in_bytes)
    return kept


@triton.jit
def nearest_noise(values: tl.tensor) -> tl.tensor:
    """Return the noise with which :func:`cut_to_bfloat16` rounds to the nearest, ties to even."""
    return 0x7FFF + ((values.to(tl.int32, bitcast=True) >> 16) & 1)


@triton.jit
def cut_to_bfloat16(values: tl.tensor, noise: tl.tensor) -> tl.tensor:
    """Add noise of 16 bits below the last bit that bfloat16 keeps to float32, then cut.

    Random bits round to one of the two neighbours, unbiased. NaN and infinities are unchanged.
    """
    kept = ((values.to(tl.int32, bitcast=True) + noise) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(values == values, kept, float("nan")).to(tl.bfloat16)
