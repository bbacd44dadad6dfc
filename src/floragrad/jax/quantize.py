"""Few-bit storage whose rounding is unbiased: what :func:`floragrad.policy.storage` lays out, as JAX arrays.

A row is cut into blocks of 64 columns that never cross into the next row; each block has one float32 scale,
its largest absolute value over the largest integer (127 or 7). Rounding is stochastic: x is stored as one of
its two neighbours on the grid, chosen so that the stored value is x in the mean. So a running average, or a
sum over many micro-batches, of stored values is unbiased, which rounding to nearest is not: small addends
vanish there. The price is noise of at most scale²/4 of variance in each number.

Rows may lie along any axis: JAX kernels are (in, out) and their rows, the outputs, are columns in memory.
``axis`` names the dimension along a row, and the buffers keep the order of dimensions of the values, so
nothing is transposed. Everything is element by element or a reduction over 64 neighbours: sharded rows are
stored where they are, and columns too where their shards are whole blocks.

Stochastic rounding in this use: Gupta et al., "Deep learning with limited numerical precision", ICML 2015.
"""

from math import ceil
from typing import Final, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from floragrad.jax import random
from floragrad.policy import QUANTIZATION_BLOCK, StateDtype, storage

LARGEST: Final = {"int8": 127, "int4": 7}
"""The largest integer of each low-bit format; the grid is symmetric.

The one integer below the grid stands for NaN: the scale cannot, since XLA's fast maxima on CPUs skip NaNs.
"""


Words = tuple[Array, Array]
"""A random word for each row and for each column."""


class Stored(NamedTuple):
    """Rows as they are kept.

    Attributes:
        payload: The numbers: float32, bfloat16, int8, or uint8 with columns 2j and 2j + 1 in the low and the
            high half of byte j.
        scale: Of each block of 64 columns, float32; None where the payload is the numbers themselves.
    """

    payload: Array
    scale: Array | None


def zeros(leading: tuple[int, ...], width: int, state_dtype: StateDtype, *, axis: int = -1) -> Stored:
    """Rows of zeros, in exactly the buffers that the policy lists.

    Args:
        leading: The dimensions other than a row's, in order.
        width: Numbers in a row.
        state_dtype: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``.
        axis: The dimension along a row, counted from the end; default the last.

    Example:
        >>> kept = zeros((8,), 100, "int4")
        >>> kept.payload.shape, kept.scale.shape
        ((8, 50), (8, 2))
    """
    buffers = {
        name: jnp.moveaxis(jnp.zeros(buffer.shape, buffer.dtype), -1, axis)
        for name, buffer in storage(leading, width, state_dtype).items()
    }
    return Stored(buffers["data"], buffers.get("scale"))


def save(values: Array, state_dtype: StateDtype, key: Array, *, axis: int = -1) -> Stored:
    """Round float32 rows to what is kept; the mean over keys of what :func:`load` gives back is ``values``.

    q = ⌊x / scale + u⌋ with u uniform in (0, 1), so E[q]·scale = x and Var[q·scale] ≤ scale²/4. A NaN stays
    one, and spoils what shares its block; an infinity makes all of its block not finite.

    Args:
        values: float32, any shape of at least one dimension.
        state_dtype: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``.
        key: Of the random bits; another one for every call. Not used for ``"float32"``.
        axis: The dimension along a row, counted from the end.

    Example:
        >>> import jax
        >>> kept = save(jnp.array([[7.0, 0.5, -7.0]]), "int4", jax.random.key(0))
        >>> load(kept, 3, "int4")[0, ::2].tolist()
        [7.0, -7.0]
    """
    if state_dtype == "float32":
        return Stored(values, None)
    (words,) = random_words(key, values.shape, axis, 1)
    return save_with_words(values, state_dtype, words, axis=axis)


def save_with_words(values: Array, state_dtype: StateDtype, words: Words | None, *, axis: int = -1) -> Stored:
    """As :func:`save`, with the words for rows and columns as an argument; None for ``"float32"``."""
    if words is None:
        return Stored(values, None)
    return save_with_bits(values, state_dtype, random_bits(*words), axis=axis)


def save_with_bits(values: Array, state_dtype: StateDtype, bits: Array, *, axis: int = -1) -> Stored:
    """As :func:`save`, with the random bits as an argument: uint32 below 2¹⁶, of the shape of ``values``."""
    if state_dtype == "float32":
        return Stored(values, None)
    if state_dtype == "bfloat16":
        return Stored(round_to_bfloat16(values, bits), None)
    return quantize(values, state_dtype, bits, axis=axis)


def load(stored: Stored, width: int, state_dtype: StateDtype, *, axis: int = -1) -> Array:
    """The float32 rows of ``width`` numbers that :func:`save` kept."""
    if stored.scale is None:
        return stored.payload.astype(jnp.float32)
    integers = stored.payload if state_dtype == "int8" else _unpack(stored.payload, width, axis)
    values = integers.astype(jnp.float32) * _spread(stored.scale, QUANTIZATION_BLOCK, width, axis)
    return jnp.where(integers < -LARGEST[state_dtype], jnp.nan, values)


def random_words(key: Array, shape: tuple[int, ...], axis: int, count: int) -> list[Words]:
    """One random word for each row and for each column of ``count`` arrays: what :func:`random_bits` is made of.

    Together they are two draws, each of which is a loop to compile; arrays of one shape are best drawn at once.

    Args:
        key: A key of ``jax.random``; another one for every call.
        shape: Of the values.
        axis: The dimension along a row.
        count: How many arrays of that shape.
    """
    rows, columns = word_shapes(shape, axis)
    row_key, column_key = random.split(key)
    return list(zip(random.words(row_key, (count, *rows)), random.words(column_key, (count, *columns)), strict=True))


def word_shapes(shape: tuple[int, ...], axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of one word for each row, and of one for each column, of values of a shape."""
    rows, columns = list(shape), [1] * len(shape)
    rows[axis], columns[axis] = 1, shape[axis]
    return tuple(rows), tuple(columns)


def random_bits(row_words: Array, column_words: Array) -> Array:
    """16 random bits for every number, as uint32: bits(r, c) = top half of h(a_r + b_c).

    a and b are one random word for each row and each column, so that drawing costs rows + columns instead of
    rows · columns, and h is a bijection of 32 bits (the finalizer of MurmurHash3 by Appleby, in the public
    domain). So each number's bits are uniform, and those of any two numbers independent, exactly: sums of
    rounding errors have the mean and the variance of truly independent ones.

    Args:
        row_words: a, with one column.
        column_words: b, with one row.
    """
    word = row_words + column_words
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ (word >> shift)) * jnp.uint32(factor)
    return word >> 16


def quantize(values: Array, state_dtype: StateDtype, bits: Array, *, axis: int = -1) -> Stored:
    """Store float32 rows in 8 or 4 bits.

    Args:
        values: float32.
        state_dtype: ``"int8"`` or ``"int4"``.
        bits: uint32 below 2¹⁶, of the shape of ``values``.
        axis: The dimension along a row.
    """
    largest = LARGEST[state_dtype]
    scale = jnp.max(jnp.abs(_split(values, QUANTIZATION_BLOCK, axis)), axis=axis) / largest
    # A block of zeros has scale 0: divide it by 1 instead.
    divisor = _spread(jnp.where(scale == 0, 1.0, scale), QUANTIZATION_BLOCK, values.shape[axis], axis)
    uniform = (bits.astype(jnp.float32) + 0.5) * 2.0**-16
    grid = values / divisor
    integers = jnp.clip(jnp.floor(grid + uniform), -largest, largest).astype(jnp.int8)
    integers = jnp.where(jnp.isnan(grid), jnp.int8(-largest - 1), integers)
    return Stored(integers if state_dtype == "int8" else _pack(integers, axis), scale)


def round_to_bfloat16(values: Array, bits: Array) -> Array:
    """Float32 rounded to one of its two bfloat16 neighbours, unbiased.

    Adding 16 random bits below the last bit that bfloat16 keeps, then cutting, rounds up with a probability
    equal to the part that is cut off. NaN and infinities stay what they are.

    Args:
        values: float32, any shape.
        bits: uint32 below 2¹⁶, the same shape.
    """
    kept = (lax.bitcast_convert_type(values, jnp.uint32) + bits) >> 16
    # Infinities have no bits to carry from; a NaN has, into its sign, or loses what told it from an infinity.
    kept = jnp.where(jnp.isnan(values), 0x7FC0, kept).astype(jnp.uint16)
    return lax.bitcast_convert_type(kept, jnp.bfloat16)


def _split(values: Array, size: int, axis: int) -> Array:
    """(..., k, ...) as (..., ceil(k / size), size, ...), the last one filled up with zeros."""
    axis %= values.ndim
    pieces = ceil(values.shape[axis] / size)
    missing = pieces * size - values.shape[axis]
    if missing:
        values = jnp.pad(values, [(0, missing if each == axis else 0) for each in range(values.ndim)])
    return values.reshape(*values.shape[:axis], pieces, size, *values.shape[axis + 1 :])


def _spread(values: Array, size: int, width: int, axis: int) -> Array:
    """Every number ``size`` times along a row, cut at ``width``."""
    axis %= values.ndim
    repeated = jnp.broadcast_to(
        jnp.expand_dims(values, axis + 1), (*values.shape[: axis + 1], size, *values.shape[axis + 1 :])
    )
    merged = repeated.reshape(*values.shape[:axis], values.shape[axis] * size, *values.shape[axis + 1 :])
    return lax.slice_in_dim(merged, 0, width, axis=axis)


def _pack(integers: Array, axis: int) -> Array:
    """Pairs of neighbours in one byte, the first in its low half."""
    axis %= integers.ndim
    pairs = _split(integers, 2, axis)
    low, high = (lax.index_in_dim(pairs, which, axis + 1, keepdims=False) for which in (0, 1))
    return lax.bitcast_convert_type((low & 15) | (high << 4), jnp.uint8)


def _unpack(payload: Array, width: int, axis: int) -> Array:
    """The inverse of :func:`_pack`, element by element: no halves are put side by side in memory."""
    axis %= payload.ndim
    both = _spread(lax.bitcast_convert_type(payload, jnp.int8), 2, width, axis)
    first = lax.broadcasted_iota(jnp.int8, [width if each == axis else 1 for each in range(both.ndim)], axis) % 2 == 0
    # A shift to the left and back extends the sign of the low half.
    return jnp.where(first, both << 4, both) >> 4
