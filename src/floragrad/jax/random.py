"""Random numbers that follow from a key alone.

JAX's defaults choose a generator, how its counters are laid out, and how wide a word is; a momentum that is written
under one choice and read under another is noise. Every choice is named here, so none of them changes a number.
"""

from collections.abc import Sequence
from math import prod
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.random import threefry_2x32
from jax.typing import ArrayLike

GENERATOR: Final = "threefry2x32"


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


def words_of_each(requests: Sequence[tuple[Array, tuple[int, ...]]]) -> list[Array]:
    """As :func:`words` of each key and shape, in one draw.

    Example:
        >>> one, other = words_of_each([(key_of(0), (3,)), (key_of(1), (2, 2))])
        >>> bool((one == words(key_of(0), (3,))).all() and (other == words(key_of(1), (2, 2))).all())
        True
    """
    if not requests:
        return []
    sizes = [prod(shape) for _, shape in requests]
    keys = [jax.random.key_data(key) for key, _ in requests]
    halves = [
        jnp.concatenate([jnp.full(size, key[at], jnp.uint32) for key, size in zip(keys, sizes, strict=True)])
        for at in range(2)
    ]
    numbers = jnp.concatenate([lax.iota(jnp.uint32, size) for size in sizes])
    drawn = threefry_2x32((halves[0], halves[1]), jnp.concatenate([jnp.zeros_like(numbers), numbers]))
    parts = jnp.split(drawn[: len(numbers)] ^ drawn[len(numbers) :], np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, (_, shape) in zip(parts, requests, strict=True)]


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
