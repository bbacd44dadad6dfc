"""Padding and splitting of one axis of an array."""

from math import ceil

import jax.numpy as jnp
from jax import Array


def zero_pad(values: Array, length: int, *, axis: int) -> Array:
    """Pad an axis with zeros at its end to a length."""
    axis %= values.ndim
    missing = length - values.shape[axis]
    if not missing:
        return values
    return jnp.pad(values, [(0, missing if each == axis else 0) for each in range(values.ndim)])


def split_blocks(values: Array, size: int, *, axis: int) -> Array:
    """Reshape (..., n, ...) to (..., ceil(n / size), size, ...), padded with zeros: element j is at divmod(j, size)."""
    axis %= values.ndim
    count = ceil(values.shape[axis] / size)
    padded = zero_pad(values, count * size, axis=axis)
    return padded.reshape(*values.shape[:axis], count, size, *values.shape[axis + 1 :])
