"""How rows of elements are stored in few bits, and rounded without bias; and the blocks of rows that are worked on.

Only one block of rows is ever float32.
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
BLOCK_ELEMENTS: Final = 2**20
"""Elements of a block of rows on the CPU: 4 MiB of float32; less would be launches, more would leave the cache."""
ACCELERATOR_BLOCK_ELEMENTS: Final = 2**24
"""The same elsewhere, where a launch costs more than a pass over memory."""
MIN_BLOCKS: Final = 3
"""Blocks that a tensor is cut into at least, so that a workspace as large as a block stays small beside it."""
SMALL_TENSOR_ELEMENTS: Final = 2**14
"""A tensor of up to so many elements is one block: its temporaries cost less than its launches."""

_MULTIPLIER: Final = 0x9E3779B1 - 2**32

Block = tuple[slice, slice]
"""Some matrices of a view, and some of their rows."""


def block_elements(elements: int, device: torch.device) -> int:
    """Return how many of a tensor's elements are worked on at a time: all of a small one's."""
    if elements <= SMALL_TENSOR_ELEMENTS:
        return elements
    return min(max_block_elements(device), ceil(elements / MIN_BLOCKS))


def max_block_elements(device: torch.device) -> int:
    """Return the same of a large tensor."""
    return BLOCK_ELEMENTS if device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS


def row_blocks(view: MatrixView, elements: int, *, gaussian: bool = False) -> Iterator[Block]:
    """Yield batches and rows of a view, a block at a time.

    Args:
        view: The tensor as (batch, rows, columns).
        elements: Elements of a block, up to a row more.
        gaussian: As few blocks as two buffers allow: a Gaussian projection is drawn again for each.
    """
    batch, rows, columns = view
    height = max(1, ceil(rows / 8) if gaussian else min(rows, ceil(elements / columns)))
    depth = max(1, elements // (rows * columns)) if height == rows else 1
    for first in range(0, batch, depth):
        for top in range(0, rows, height):
            yield slice(first, min(first + depth, batch)), slice(top, min(top + height, rows))


class RoundingBits(NamedTuple):
    """Random words for stochastic rounding: one for each row and one for each column of some rows.

    Drawing costs rows + columns instead of rows · columns, and a part of a tensor has the bits that it has in
    the whole tensor, however the tensor is cut or sharded.

    Attributes:
        rows: (batch, rows, 1), int32.
        columns: (columns,), int32.
    """

    rows: Tensor
    columns: Tensor

    def of(self, where: tuple[slice, slice]) -> "RoundingBits":
        """Return the words of a block of rows."""
        return RoundingBits(self.rows[where], self.columns)

    def integers(self) -> Tensor:
        """Integers, uniform over -32768 ... 32767, any two of them independent: int32 of (batch, rows, columns).

        The upper half of h(a + b) with h(w) = (w xor w >> 16) · 0x9E3779B1, a bijection of 32 bits: so each
        number's bits are uniform, and those of two numbers independent, exactly. Without h the sum of a row's and
        a column's word would do for that too, but rounding errors would be a matrix of low rank (of five
        singular values 80% of its squared norm), which an update should not have.
        """
        words = self.rows + self.columns
        words.bitwise_xor_(words >> 16)
        return words.mul_(_MULTIPLIER).bitwise_right_shift_(16)


def _blocks(values: Tensor) -> list[Tensor]:
    """(..., k) as views (..., blocks, 64) of the whole blocks and (..., 1, rest) of a short last one."""
    whole = values.shape[-1] // QUANTIZATION_BLOCK
    cut = whole * QUANTIZATION_BLOCK
    views = []
    if whole:
        views.append(values[..., :cut].view(*values.shape[:-1], whole, QUANTIZATION_BLOCK))
    if cut < values.shape[-1]:
        views.append(values[..., cut:].unsqueeze(-2))
    return views


def _per_block(values: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the blocks with their scales, (..., blocks, 1)."""
    first = 0
    for block in _blocks(values):
        count = block.shape[-2]
        yield block, scale[..., first : first + count].unsqueeze(-1)
        first += count


def quantize(values: Tensor, state_dtype: StateDtype, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Store float32 rows in 8 or 4 bits; the mean over ``bits`` of what is stored is ``values``.

    q = ⌊x / scale + u⌋ with u uniform in (0, 1), so E[q]·scale = x and Var[q·scale] ≤ scale²/4. What is not
    finite makes its block not finite.

    Args:
        values: (..., k), float32.
        state_dtype: ``"int8"`` or ``"int4"``.
        bits: (..., k), integers of 16 bits, from :meth:`RoundingBits.integers`.

    Returns:
        The payload, int8 of (..., k) or uint8 of (..., ceil(k/2)), and the scales, float32 of
        (..., ceil(k/64)). Byte j of ``int4`` holds column 2j in its low half and 2j + 1 in its high one.
    """
    largest = LARGEST[state_dtype]
    # Twenty times faster than the vector norm on a CPU, and as small: no absolute values are written.
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
    """The float32 rows (..., width) that :func:`quantize` stored."""
    integers = payload if state_dtype == "int8" else _unpack(payload, width)
    values = integers.float()
    for block, factor in _per_block(values, scale):
        block.mul_(factor)
    return values


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
    """Float32 rounded to one of its two bfloat16 neighbours, unbiased.

    Adding 16 random bits below the last bit that bfloat16 keeps, then cutting, rounds up with a probability
    equal to the part that is cut off. NaN and infinities stay what they are.

    Args:
        values: float32, any shape.
        bits: Integers of 16 bits, the same shape, from :meth:`RoundingBits.integers`.
    """
    noise = bits.to(torch.int32) & 0xFFFF
    kept = noise.add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    # Infinities have no bits to carry from; a NaN has, into its sign, or loses what told it from an infinity.
    return kept.masked_fill_(values.isnan(), torch.nan).bfloat16()


@dataclass(frozen=True)
class StoredRows:
    """The buffers of some rows, read and written a block at a time.

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

    def read(self, where: Block) -> tuple[Tensor, ...]:
        """Return the stored tensors of a block, for :func:`load`."""
        return tuple(buffer[where] for buffer in self.buffers)

    def write(self, where: Block, values: tuple[Tensor, ...]) -> None:
        """Store the output of :func:`save` for a block."""
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer[where] = value

    def bits(self, where: Block) -> RoundingBits | None:
        """Return the random words of one block; None where nothing is rounded."""
        return None if self.rounding is None else self.rounding.of(where)


def load(kept: tuple[Tensor, ...], dtype: StateDtype, width: int) -> Tensor:
    """Return the float32 rows that :func:`save` stored; of float32 storage the very tensor that was given."""
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
