"""Random numbers that depend on a key alone.

JAX's defaults choose a generator, its counter layout, and the width of a word; a momentum encoded under one choice and
decoded under another is noise. This module fixes each choice, so that no default changes a random bit.
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


def key_from_seed(seed: ArrayLike) -> Array:
    """Return the key of a seed, 0 to 2**32 - 1."""
    return jax.random.key(seed, impl=GENERATOR)


def fold_in(key: Array, number: ArrayLike) -> Array:
    """Fold a number, 0 to 2**32 - 1, into a key."""
    with jax.threefry_partitionable(True):
        return jax.random.fold_in(key, number)


def split(key: Array, count: int = 2) -> Array:
    """Split a key into ``count`` independent keys; default 2."""
    with jax.threefry_partitionable(True):
        return jax.random.split(key, count)


def words(key: Array, shape: tuple[int, ...]) -> Array:
    """Draw independent words of 32 random bits, uint32."""
    with jax.threefry_partitionable(True):
        return jax.random.bits(key, shape, jnp.uint32)


@jax.jit
def fold(key: Pair, number: Array) -> Pair:
    """Return the two words of Threefry-2x32 for a key and the counter (0, number): a folded key, or random words.

    The rounds are unrolled: JAX's own are a loop on CPUs, which takes several times as long to compile.

    Args:
        key: Two words, uint32.
        number: Numbers to fold in, uint32, any shape.

    Example:
        >>> key = key_from_seed(5)
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
    """Return the sign of each word, float32: -1 where its highest bit is set.

    Example:
        >>> key = key_from_seed(0)
        >>> bool((signs(words(key, (99,))) == jax.random.rademacher(key, (99,), jnp.float32)).all())
        True
    """
    return jnp.where(drawn >> 31 == 0, jnp.float32(1), jnp.float32(-1))


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Draw independent samples of N(0, 1), float32."""
    with jax.threefry_partitionable(True):
        return jax.random.normal(key, shape, jnp.float32)


def uniform(key: Array, shape: tuple[int, ...], bound: float) -> Array:
    """Draw independent uniform samples in [-bound, bound), float32."""
    with jax.threefry_partitionable(True):
        return jax.random.uniform(key, shape, jnp.float32, minval=-bound, maxval=bound)
