"""Random numbers that follow from a key alone.

JAX's defaults choose a generator, how its counters are laid out, and how wide a word is; a momentum that is written
under one choice and read under another is noise. Every choice is named here, so none of them changes a number.
"""

from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

GENERATOR: Final = "threefry2x32"
_ROTATIONS: Final = ((13, 15, 26, 6), (17, 29, 16, 24))

Pair = tuple[Array, Array]
"""The two words of a key."""


def key_of(seed: ArrayLike) -> Array:
    """The key of a seed, 0 to 2**32 - 1."""
    return jax.random.key(seed, impl=GENERATOR)


def fold_in(key: Array, number: ArrayLike) -> Array:
    """Another key for every number, 0 to 2**32 - 1."""
    with jax.threefry_partitionable(True):
        return jax.random.fold_in(key, number)


def split(key: Array, count: int = 2) -> Array:
    """As many independent keys."""
    with jax.threefry_partitionable(True):
        return jax.random.split(key, count)


def words(key: Array, shape: tuple[int, ...]) -> Array:
    """Independent words of 32 random bits, uint32."""
    with jax.threefry_partitionable(True):
        return jax.random.bits(key, shape, jnp.uint32)


@jax.jit
def fold(key: Pair, number: Array) -> Pair:
    """The two words of Threefry-2x32 for a key and the counter (0, number): another key, or what words are made of.

    Every round is spelt out: JAX's own is a loop on CPUs, which takes several times as long to compile.

    Args:
        key: Two words, uint32.
        number: uint32, of any shape.

    Example:
        >>> key = key_of(5)
        >>> one, other = fold(tuple(jax.random.key_data(key)), lax.iota(jnp.uint32, 3))
        >>> bool((one ^ other == words(key, (3,))).all())
        True
    """
    keys = (*key, lax.bitwise_xor(lax.bitwise_xor(*key), np.uint32(0x1BD11BDA)))
    one, other = keys[0], lax.add(keys[1], number)
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            one = lax.add(one, other)
            left = lax.shift_left(other, np.uint32(rotation))
            right = lax.shift_right_logical(other, np.uint32(32 - rotation))
            other = lax.bitwise_xor(one, lax.bitwise_or(left, right))
        one = lax.add(one, keys[(group + 1) % 3])
        other = lax.add(other, lax.add(keys[(group + 2) % 3], np.uint32(group + 1)))
    return one, other


def signs(drawn: Array) -> Array:
    """The sign of each word, float32: -1 where its highest bit is set.

    Example:
        >>> key = key_of(0)
        >>> bool((signs(words(key, (99,))) == jax.random.rademacher(key, (99,), jnp.float32)).all())
        True
    """
    return jnp.where(drawn >> 31 == 0, jnp.float32(1), jnp.float32(-1))


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Independent N(0, 1), float32."""
    with jax.threefry_partitionable(True):
        return jax.random.normal(key, shape, jnp.float32)


def uniform(key: Array, shape: tuple[int, ...], bound: float) -> Array:
    """Independent and uniform in [-bound, bound), float32."""
    with jax.threefry_partitionable(True):
        return jax.random.uniform(key, shape, jnp.float32, minval=-bound, maxval=bound)
