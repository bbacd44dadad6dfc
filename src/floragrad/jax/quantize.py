"""Low-bit storage with unbiased rounding: the buffers of :func:`floragrad.policy.storage` as JAX arrays.

A row is split into blocks of 64 columns; each block has one float32 scale, its largest absolute value divided by the
largest integer (127 or 7). Rounding is stochastic: x is stored as one of its two neighbours on the grid, with
probabilities that make the expected stored value x. So a running average of stored values, or a sum over many
micro-batches, is unbiased; with rounding to nearest small addends vanish. The price is a variance of at most scale²/4
in each element.

A row may be along any axis: JAX kernels are (in, out) and their rows, the outputs, are columns in memory. ``axis`` is
the dimension along a row, and the buffers keep the order of dimensions of the values, so nothing is transposed. All
operations are elementwise or reductions over blocks: no communication where rows are sharded, nor where columns are
sharded into whole blocks.

Stochastic rounding in this use: Gupta et al., "Deep learning with limited numerical precision", ICML 2015.
"""

from typing import Any, Final, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from floragrad.jax import random
from floragrad.jax.blocks import split_blocks
from floragrad.jax.trees import array_spec
from floragrad.policy import QUANTIZATION_BLOCK, StateDtype, storage

LARGEST: Final = {"int8": 127, "int4": 7}
"""Largest integer of each low-bit format; the grid is symmetric.

The one integer below the grid encodes NaN: the scale cannot, since XLA's fast maxima on CPUs skip NaNs.
"""


Words = tuple[Array, Array]
"""Random words of rows and of columns, uint32; see :func:`random_bits`."""


class Stored(NamedTuple):
    """Rows in their storage format.

    Attributes:
        payload: float32, bfloat16, int8, or uint8 with columns 2j and 2j + 1 in the low and the high half of byte j.
        scale: Scale of each block of 64 columns, float32; None for float32 and bfloat16.
    """

    payload: Array
    scale: Array | None


def specs(shape: tuple[int, ...], state_dtype: StateDtype, *, axis: int = -1) -> Stored:
    """Return the shapes and dtypes of stored rows: the buffers of the policy.

    Args:
        shape: Shape of the float32 values; ``()`` only for ``"float32"``.
        state_dtype: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``.
        axis: The dimension along a row, counted from the end; default -1.

    Example:
        >>> stored = specs((8, 100), "int4")
        >>> stored.payload.shape, stored.scale.shape
        ((8, 50), (8, 2))
    """
    if not shape:
        return Stored(array_spec((), jnp.float32), None)
    buffers = storage((), shape[axis], state_dtype)

    def spec(name: str) -> Any:
        ((length,), dtype) = buffers[name]
        along = list(shape)
        along[axis] = length
        return array_spec(along, dtype)

    return Stored(spec("data"), spec("scale") if "scale" in buffers else None)


def save(values: Array, state_dtype: StateDtype, key: Array, *, axis: int = -1) -> Stored:
    """Store float32 rows with stochastic rounding; the mean of :func:`load` over keys is ``values``.

    q = ⌊x / scale + u⌋ with u uniform in (0, 1), so E[q]·scale = x and Var[q·scale] ≤ scale²/4. A NaN stays NaN and may
    make its block NaN; an infinity makes its block not finite.

    Args:
        values: float32, at least one dimension.
        state_dtype: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``.
        key: Key of the random bits, a new one for each call. Unused for ``"float32"``.
        axis: The dimension along a row, counted from the end; default -1.

    Example:
        >>> import jax
        >>> stored = save(jnp.array([[7.0, 0.5, -7.0]]), "int4", jax.random.key(0))
        >>> load(stored, 3, "int4")[0, ::2].tolist()
        [7.0, -7.0]
    """
    if state_dtype == "float32":
        return Stored(values, None)
    (words,) = random_words(key, values.shape, axis, 1)
    return save_with_words(values, state_dtype, words, axis=axis)


def save_with_words(values: Array, state_dtype: StateDtype, words: Words | None, *, axis: int = -1) -> Stored:
    """Store float32 rows like :func:`save`, from words of rows and columns; None for ``"float32"``."""
    if words is None:
        return Stored(values, None)
    return save_with_bits(values, state_dtype, random_bits(*words), axis=axis)


def save_with_bits(values: Array, state_dtype: StateDtype, bits: Array, *, axis: int = -1) -> Stored:
    """Store float32 rows like :func:`save`, from random bits: uint32 below 2¹⁶, in the shape of ``values``."""
    if state_dtype == "float32":
        return Stored(values, None)
    if state_dtype == "bfloat16":
        return Stored(round_to_bfloat16(values, bits), None)
    return quantize(values, state_dtype, bits, axis=axis)


def load(stored: Stored, width: int, state_dtype: StateDtype, *, axis: int = -1) -> Array:
    """Return the float32 rows, ``width`` columns each, stored by :func:`save`."""
    if stored.scale is None:
        return stored.payload.astype(jnp.float32)
    integers = stored.payload if state_dtype == "int8" else _unpack(stored.payload, width, axis)
    values = integers.astype(jnp.float32) * _repeat_blocks(stored.scale, QUANTIZATION_BLOCK, width, axis)
    return jnp.where(integers < -LARGEST[state_dtype], jnp.nan, values)


def random_words(key: Array, shape: tuple[int, ...], axis: int, count: int) -> list[Words]:
    """Draw one random word for each row and each column of ``count`` arrays, the input of :func:`random_bits`.

    All arrays take two draws, each a loop to compile: draw for all arrays of one shape at once.

    Args:
        key: A key of ``jax.random``, a new one for each call.
        shape: Shape of the values.
        axis: The dimension along a row.
        count: Number of arrays of that shape.
    """
    rows, columns = word_shapes(shape, axis)
    row_key, column_key = random.split(key)
    return list(zip(random.words(row_key, (count, *rows)), random.words(column_key, (count, *columns)), strict=True))


def word_shapes(shape: tuple[int, ...], axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the words of rows and of the words of columns for values of a shape."""
    rows, columns = list(shape), [1] * len(shape)
    rows[axis], columns[axis] = 1, shape[axis]
    return tuple(rows), tuple(columns)


def random_bits(row_words: Array, column_words: Array) -> Array:
    """Return 16 random bits for each element, as uint32: bits(r, c) = top half of h(a_r + b_c).

    a and b are one random word for each row and each column, so that drawing costs rows + columns instead of
    rows · columns, and h is a bijection of 32 bits (the finalizer of MurmurHash3 by Appleby, in the public domain). So
    the bits of each element are uniform, and those of any two elements independent, exactly: sums of rounding errors
    have the mean and the variance of independent ones.

    Args:
        row_words: a, uint32, one column.
        column_words: b, uint32, one row.
    """
    word = row_words + column_words
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ (word >> shift)) * jnp.uint32(factor)
    return word >> 16


def quantize(values: Array, state_dtype: StateDtype, bits: Array, *, axis: int = -1) -> Stored:
    """Quantize float32 rows to 8 or 4 bits.

    Args:
        values: float32.
        state_dtype: ``"int8"`` or ``"int4"``.
        bits: uint32 below 2¹⁶, in the shape of ``values``.
        axis: The dimension along a row; default -1.
    """
    largest = LARGEST[state_dtype]
    scale = jnp.max(jnp.abs(split_blocks(values, QUANTIZATION_BLOCK, axis=axis)), axis=axis) / largest
    # A block of zeros has scale 0: divide it by 1 instead.
    divisor = _repeat_blocks(jnp.where(scale == 0, 1.0, scale), QUANTIZATION_BLOCK, values.shape[axis], axis)
    uniform = (bits.astype(jnp.float32) + 0.5) * 2.0**-16
    grid = values / divisor
    integers = jnp.clip(jnp.floor(grid + uniform), -largest, largest).astype(jnp.int8)
    integers = jnp.where(jnp.isnan(grid), jnp.int8(-largest - 1), integers)
    return Stored(integers if state_dtype == "int8" else _pack(integers, axis), scale)


def round_to_bfloat16(values: Array, bits: Array) -> Array:
    """Round float32 to one of its two bfloat16 neighbours, unbiased.

    Adding 16 random bits below the last bit of bfloat16, then truncating, rounds up with a probability equal to the
    truncated fraction. NaN and infinities are unchanged.

    Args:
        values: float32, any shape.
        bits: uint32 below 2¹⁶, the same shape.
    """
    upper = (lax.bitcast_convert_type(values, jnp.uint32) + bits) >> 16
    # An infinity has no low bits that could carry; a NaN may carry into its sign, or be truncated to an infinity.
    upper = jnp.where(jnp.isnan(values), 0x7FC0, upper).astype(jnp.uint16)
    return lax.bitcast_convert_type(upper, jnp.bfloat16)


def _repeat_blocks(values: Array, size: int, width: int, axis: int) -> Array:
    """Repeat each element ``size`` times along a row, cut at ``width``."""
    axis %= values.ndim
    repeated = jnp.broadcast_to(
        jnp.expand_dims(values, axis + 1), (*values.shape[: axis + 1], size, *values.shape[axis + 1 :])
    )
    merged = repeated.reshape(*values.shape[:axis], values.shape[axis] * size, *values.shape[axis + 1 :])
    return lax.slice_in_dim(merged, 0, width, axis=axis)


def _pack(integers: Array, axis: int) -> Array:
    """Pack pairs of neighbours in one byte, the first in its low half."""
    axis %= integers.ndim
    pairs = split_blocks(integers, 2, axis=axis)
    low, high = (lax.index_in_dim(pairs, half, axis + 1, keepdims=False) for half in (0, 1))
    return lax.bitcast_convert_type((low & 15) | (high << 4), jnp.uint8)


def _unpack(payload: Array, width: int, axis: int) -> Array:
    """Invert :func:`_pack` elementwise, without an interleave in memory."""
    axis %= payload.ndim
    both = _repeat_blocks(lax.bitcast_convert_type(payload, jnp.int8), 2, width, axis)
    first = lax.broadcasted_iota(jnp.int8, [width if each == axis else 1 for each in range(both.ndim)], axis) % 2 == 0
    # A shift to the left and back extends the sign of the low half.
    return jnp.where(first, both << 4, both) >> 4
