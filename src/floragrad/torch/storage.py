"""Low-bit storage of rows with unbiased rounding, and their division into blocks.

Only one block of rows is float32 at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Final, NamedTuple

import torch
from torch import Tensor

from floragrad.policy import QUANTIZATION_BLOCK, MatrixView, StateDtype

LARGEST: Final = {"int8": 127, "int4": 7}
"""The largest integer of each low-bit format; the grid is symmetric."""
LEVELS: Final = 255
"""The largest level of a second moment in 8 bits."""
BLOCK_ELEMENTS: Final = 2**20
"""Elements of a block of rows on the CPU, 4 MiB of float32: few launches that stay in the cache."""
ACCELERATOR_BLOCK_ELEMENTS: Final = 2**24
"""Elements of a block of rows on accelerators, where launches cost more."""
MIN_BLOCKS: Final = 3
"""Least number of blocks of a tensor, so that a workspace of one block stays small beside it."""
SMALL_TENSOR_ELEMENTS: Final = 2**14
"""Elements up to which a tensor is one block: its temporaries cost less than more launches."""

_MULTIPLIER: Final = 0x9E3779B1 - 2**32

Block = tuple[slice, slice]
"""Range of matrices of a view, and of their rows."""


def block_elements(elements: int, device: torch.device) -> int:
    """Return the number of elements of a tensor's blocks; a small tensor is one block."""
    if elements <= SMALL_TENSOR_ELEMENTS:
        return elements
    return min(max_block_elements(device), ceil(elements / MIN_BLOCKS))


def max_block_elements(device: torch.device) -> int:
    """Return the number of elements of a large tensor's blocks."""
    return BLOCK_ELEMENTS if device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS


def row_blocks(view: MatrixView, elements: int, *, gaussian: bool = False) -> Iterator[Block]:
    """Yield batches and rows of a view, a block at a time.

    Args:
        view: The tensor as (batch, rows, columns).
        elements: Elements of a block, up to a row more.
        gaussian: Eight blocks, since a Gaussian projection is drawn again for each.
    """
    batch, rows, columns = view
    height = max(1, ceil(rows / 8) if gaussian else min(rows, ceil(elements / columns)))
    depth = max(1, elements // (rows * columns)) if height == rows else 1
    for first in range(0, batch, depth):
        for top in range(0, rows, height):
            yield slice(first, min(first + depth, batch)), slice(top, min(top + height, rows))


class RoundingBits(NamedTuple):
    """Random words for stochastic rounding: one for each row and one for each column of some rows.

    They cost rows + columns draws instead of rows · columns, and a part of a tensor has the bits that it has in
    the whole tensor, in any division or sharding.

    Attributes:
        rows: (batch, rows, 1), int32.
        columns: (columns,), int32.
    """

    rows: Tensor
    columns: Tensor

    def of(self, block: tuple[slice, slice]) -> "RoundingBits":
        """Return the words of a block of rows."""
        return RoundingBits(self.rows[block], self.columns)

    def integers(self) -> Tensor:
        """Return uniform integers from -32768 to 32767, pairwise independent: int32 of (batch, rows, columns).

        The upper half of h(a + b) with h(w) = (w xor w >> 16) · 0x9E3779B1, a bijection of 32 bits: so each
        integer is uniform, and any two are independent, exactly. Without h the sum of a row's and a column's word
        would do for that too, but rounding errors would be a matrix of low rank (five singular values with 80% of
        its squared norm), which an update should not have.
        """
        words = self.rows + self.columns
        words.bitwise_xor_(words >> 16)
        return words.mul_(_MULTIPLIER).bitwise_right_shift_(16)


def _blocks(values: Tensor) -> list[Tensor]:
    """Return views of (..., k): (..., blocks, 64) of the whole blocks and (..., 1, rest) of a short last one."""
    whole = values.shape[-1] // QUANTIZATION_BLOCK
    cut = whole * QUANTIZATION_BLOCK
    views = []
    if whole:
        views.append(values[..., :cut].view(*values.shape[:-1], whole, QUANTIZATION_BLOCK))
    if cut < values.shape[-1]:
        views.append(values[..., cut:].unsqueeze(-2))
    return views


def _per_block(values: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of the blocks with their scales, (..., blocks, 1)."""
    first = 0
    for block in _blocks(values):
        count = block.shape[-2]
        yield block, scale[..., first : first + count].unsqueeze(-1)
        first += count


def quantize(values: Tensor, state_dtype: StateDtype, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize float32 rows to 8 or 4 bits; the mean of the result over ``bits`` is ``values``.

    q = ⌊x / scale + u⌋ with u uniform in (0, 1), so E[q]·scale = x and Var[q·scale] ≤ scale²/4. An element that
    is not finite makes its block not finite.

    Args:
        values: (..., k), float32.
        state_dtype: ``"int8"`` or ``"int4"``.
        bits: (..., k), integers of 16 bits, from :meth:`RoundingBits.integers`.

    Returns:
        The payload, int8 of (..., k) or uint8 of (..., ceil(k/2)), and the scales, float32 of
        (..., ceil(k/64)). Byte j of ``int4`` holds column 2j in its low half and 2j + 1 in its high one.
    """
    largest = LARGEST[state_dtype]
    # Twenty times as fast as the vector norm on a CPU, without a temporary of absolute values.
    norms = [torch.maximum(block.amax(-1), -block.amin(-1)) for block in _blocks(values)]
    scale = torch.cat(norms, dim=-1).div_(largest)
    # A block of zeros has scale 0: divide it by 1 instead.
    divisors = torch.where(scale == 0, 1.0, scale)
    grid = bits.float().add_(32768.5).mul_(2.0**-16)
    for block, (onto, divisor) in zip(_blocks(values), _per_block(grid, divisors), strict=True):
        onto.addcdiv_(block, divisor)
    integers = grid.floor_().clamp_(-largest, largest).to(torch.int8)
    return (integers if state_dtype == "int8" else _pack(integers)), scale


def dequantize(payload: Tensor, scale: Tensor, state_dtype: StateDtype, width: int) -> Tensor:
    """Return the float32 rows (..., width) that :func:`quantize` stored."""
    integers = payload if state_dtype == "int8" else _unpack(payload, width)
    values = integers.float()
    for block, factor in _per_block(values, scale):
        block.mul_(factor)
    return values


def quantize_squares_(values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize float32 rows of averaged squares to 8 bits, in their own memory, which is written over.

    Level q of a block with the largest element v is v·(q / 255)⁴, so that square roots down to a 65,025th of the
    largest are told apart. Of the two levels around an element one is drawn, with the element as the mean. Elements
    below level 1 are raised to it, for the update divides by their roots.

    Args:
        values: (..., n), float32 and finite, at least 0.
        bits: (..., n), integers of 16 bits, from :meth:`RoundingBits.integers`.

    Returns:
        The levels, uint8 of (..., n), and the largest elements, float32 of (..., ceil(n/64)).
    """
    largest = torch.cat([block.amax(-1) for block in _blocks(values)], dim=-1)
    for block, divisor in _per_block(values, torch.where(largest == 0, 1.0, largest)):
        block.div_(divisor)
    levels = values.sqrt().sqrt_().mul_(LEVELS).floor_().clamp_(1, LEVELS - 1)
    low = _level_values(levels.clone())
    distance = _level_values(levels + 1).sub_(low)
    chance = values.sub_(low).div_(distance)
    del low, distance
    uniform = bits.float().add_(32768.5).mul_(2.0**-16)
    return levels.add_(uniform < chance).to(torch.uint8), largest


def dequantize_squares(levels: Tensor, largest: Tensor) -> Tensor:
    """Return the float32 rows that :func:`quantize_squares_` stored."""
    values = _level_values(levels.float())
    for block, factor in _per_block(values, largest):
        block.mul_(factor)
    return values


def _level_values(levels: Tensor) -> Tensor:
    """Return (q / 255)⁴ of levels q, in their memory."""
    return levels.div_(LEVELS).square_().square_()


def _pack(integers: Tensor) -> Tensor:
    if integers.shape[-1] % 2:
        integers = torch.nn.functional.pad(integers, (0, 1))
    low, high = integers[..., 0::2], integers[..., 1::2]
    return ((low & 15) | (high << 4)).view(torch.uint8)


def _unpack(payload: Tensor, width: int) -> Tensor:
    signed = payload.view(torch.int8)
    # A shift to the left and back extends the sign of the low half.
    return torch.stack([(signed << 4) >> 4, signed >> 4], dim=-1).flatten(-2)[..., :width]


def repacked_int4(payload: Tensor, width: int) -> Tensor:
    """Return an int4 payload of version 0.1, whose byte j holds columns j and ceil(k/2) + j, in today's layout."""
    signed = payload.view(torch.int8)
    return _pack(torch.cat([(signed << 4) >> 4, signed >> 4], dim=-1)[..., :width])


def round_to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to one of its two bfloat16 neighbours, without bias.

    Adding 16 random bits below the last bit that bfloat16 keeps, then cutting, rounds up with a probability
    equal to the part that is cut off. NaN and infinities are unchanged.

    Args:
        values: float32, any shape.
        bits: Integers of 16 bits, the same shape, from :meth:`RoundingBits.integers`.
    """
    noise = bits.to(torch.int32) & 0xFFFF
    kept = noise.add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    # The addition may carry into a NaN's sign, or the cut turn it into an infinity; infinities are unchanged.
    return kept.masked_fill_(values.isnan(), torch.nan).bfloat16()


@dataclass(frozen=True)
class StoredRows:
    """Buffers of some rows, read and written a block at a time.

    Attributes:
        buffers: ``data``, (batch, rows, ...), and ``scale`` where it is low-bit; none where nothing is kept.
        width: Elements of a row.
        dtype: Storage format.
        rounding: Random words for stochastic rounding; None where nothing is rounded.
    """

    buffers: tuple[Tensor, ...]
    width: int
    dtype: StateDtype
    rounding: RoundingBits | None

    def read(self, block: Block) -> tuple[Tensor, ...]:
        """Return the stored tensors of a block, for :func:`load`."""
        return tuple(buffer[block] for buffer in self.buffers)

    def write(self, block: Block, values: tuple[Tensor, ...]) -> None:
        """Store the output of :func:`save` for a block."""
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer[block] = value

    def bits(self, block: Block) -> RoundingBits | None:
        """Return the random words of one block; None where nothing is rounded."""
        return None if self.rounding is None else self.rounding.of(block)


def load(kept: tuple[Tensor, ...], dtype: StateDtype, width: int) -> Tensor:
    """Return the float32 rows that :func:`save` stored; for float32 storage the tensor itself."""
    if dtype in ("int8", "int4"):
        payload, scale = kept
        return dequantize(payload, scale, dtype, width)
    return kept[0].float()


def save(values: Tensor, dtype: StateDtype, bits: RoundingBits | None) -> tuple[Tensor, ...]:
    """Return the stored form of float32 rows, rounded stochastically with ``bits``."""
    if bits is None:
        return (values,)
    if dtype == "bfloat16":
        return (round_to_bfloat16(values, bits.integers()),)
    return quantize(values, dtype, bits.integers())
