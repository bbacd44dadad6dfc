"""Random words, signs and rounding bits: NumPy's Philox4x64-10 stream, counted by position.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from typing import Final

import triton
import triton.language as tl
from triton.language.random import philox_impl

from floragrad._streams import Stream

MOMENTUM: Final = tl.constexpr(int(Stream.MOMENTUM))
ACCUMULATOR: Final = tl.constexpr(int(Stream.ACCUMULATOR))
STATE_ROUNDING: Final = tl.constexpr(int(Stream.STATE_ROUNDING))
PARAMETER_ROUNDING: Final = tl.constexpr(int(Stream.PARAMETER_ROUNDING))
ADAPTIVE_NOISE: Final = tl.constexpr(int(Stream.ADAPTIVE_NOISE))
ACCUMULATOR_ROUNDING: Final = tl.constexpr(int(Stream.ACCUMULATOR_ROUNDING))

HASH: Final = tl.constexpr(0x9E3779B1 - 2**32)
"""The multiplier of ``RoundingBits.integers``."""


@triton.jit
def random_words(
    seed: tl.tensor, tensor_id: tl.tensor, counter: tl.tensor, stream: tl.constexpr, position: tl.tensor
) -> tl.tensor:
    """Return the 64-bit words of one tensor's stream, from ``position`` (integers from 0)."""
    block = (position >> 2).to(tl.uint64) + 1  # NumPy counts one up before each block of four words
    none = block * 0
    first, second, third, fourth = philox_impl(
        block,
        none + counter.to(tl.uint64),
        none + stream,
        none,
        none + seed.to(tl.uint64),
        none + tensor_id.to(tl.uint64),
    )
    which = position & 3
    return tl.where(which < 2, tl.where(which == 0, first, second), tl.where(which == 2, third, fourth))


@triton.jit
def rounding_words(
    seed: tl.tensor, tensor_id: tl.tensor, counter: tl.tensor, stream: tl.constexpr, position: tl.tensor
) -> tl.tensor:
    """Return words of 32 bits as int32; two of them are one of 64, the low half first."""
    pair = random_words(seed, tensor_id, counter, stream, position >> 1)
    return (pair >> ((position & 1) * 32).to(tl.uint64)).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def sign_of(word: tl.tensor, column: tl.tensor) -> tl.tensor:
    """Return a column's sign of the word of its 64: bytes in order, the highest bit of each first."""
    bit = (word >> ((column & 63) ^ 7).to(tl.uint64)) & 1
    return tl.where(bit == 1, 1.0, -1.0)


@triton.jit
def random_signs(
    seed: tl.tensor, tensor_id: tl.tensor, counter: tl.tensor, stream: tl.constexpr, column: tl.tensor
) -> tl.tensor:
    """Return +1 and -1 for columns, float32."""
    return sign_of(random_words(seed, tensor_id, counter, stream, column >> 6), column)


@triton.jit
def slice_signs(
    seed: tl.tensor,
    tensor_id: tl.tensor,
    counter: tl.tensor,
    stream: tl.constexpr,
    first: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Return the signs of up to 64 columns from each of ``first`` on, (slices, COLUMNS): of two words a slice."""
    before = random_words(seed, tensor_id, counter, stream, first >> 6)
    after = random_words(seed, tensor_id, counter, stream, (first >> 6) + 1)
    column = first[:, None] + tl.arange(0, COLUMNS)[None, :]
    return sign_of(tl.where((column >> 6) == (first >> 6)[:, None], before[:, None], after[:, None]), column)


@triton.jit
def rounding_bits(row_words: tl.tensor, column_words: tl.tensor) -> tl.tensor:
    """Return h(a + b) >> 16 of words a and b, int32 from -32768 to 32767, as ``RoundingBits.integers`` does."""
    words = row_words + column_words
    words = words ^ (words >> 16)
    return (words * HASH) >> 16
