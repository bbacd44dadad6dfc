"""Few-bit storage whose rounding is unbiased.

A row is cut into blocks of 64 columns that never cross into the next row; each block has one float32 scale,
its largest absolute value over the largest integer (127 or 7). Rounding is stochastic: x is stored as one of
its two neighbours on the grid, chosen so that the stored value is x in the mean. So a running average, or a
sum over many micro-batches, of stored values is unbiased, which rounding to nearest is not: small addends
vanish there. The price is noise of at most scale²/4 of variance in each number.

Stochastic rounding in this use: Gupta et al., "Deep learning with limited numerical precision", ICML 2015.
"""

from collections.abc import Iterator
from math import ceil, prod
from typing import Final, NamedTuple

import torch
from torch import Tensor

from floragrad.policy import QUANTIZATION_BLOCK, StateDtype
from floragrad.torch.philox import Philox

LARGEST: Final = {"int8": 127, "int4": 7}
"""The largest integer of each low-bit format; the grid is symmetric."""


_MULTIPLIER: Final = 0x9E3779B1 - 2**32


class RoundingBits(NamedTuple):
    """What the 16 random bits of every number of some rows are made of: a word for each row and each column.

    Drawing costs rows + columns instead of rows · columns, and a part of a tensor has the bits that it has in
    the whole tensor, however the tensor is cut or sharded.

    Attributes:
        rows: (batch, rows, 1), int32.
        columns: (columns,), int32.
    """

    rows: Tensor
    columns: Tensor

    def of(self, where: tuple[slice, slice]) -> "RoundingBits":
        """Those of a block of rows."""
        return RoundingBits(self.rows[where], self.columns)

    def numbers(self) -> Tensor:
        """Integers, uniform over -32768 ... 32767, any two of them independent: int32 of (batch, rows, columns).

        The upper half of h(a + b) with h(w) = (w xor w >> 16) · 0x9E3779B1, a bijection of 32 bits: so each
        number's bits are uniform, and those of two numbers independent, exactly. Without h the sum of a row's and
        a column's word would do for that too, but rounding errors would be a matrix of low rank (of five
        singular values 80% of its squared norm), which an update should not have.
        """
        words = self.rows + self.columns
        words.bitwise_xor_(words >> 16)
        return words.mul_(_MULTIPLIER).bitwise_right_shift_(16)


def draw_rounding_bits(source: Philox, leading: tuple[int, ...], columns: int) -> RoundingBits:
    """The words of a whole tensor, on the CPU: rows in the shape of ``leading``, and columns."""
    count = prod(leading) + columns
    words = torch.from_numpy(source.words(ceil(count / 2)).astype("<u8", copy=False).view("<i4")[:count])
    return RoundingBits(words[: count - columns].view(leading), words[count - columns :])


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
        bits: (..., k), integers of 16 bits, from :meth:`RoundingBits.numbers`.

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
        bits: Integers of 16 bits, the same shape, from :meth:`RoundingBits.numbers`.
    """
    noise = bits.to(torch.int32) & 0xFFFF
    kept = noise.add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    # Infinities have no bits to carry from; a NaN has, into its sign, or loses what told it from an infinity.
    return kept.masked_fill_(values.isnan(), torch.nan).bfloat16()
