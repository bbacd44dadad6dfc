"""Random words of one step, drawn in one loop for all leaves of one kind: a loop for each leaf is slow to compile."""

from collections.abc import Sequence
from functools import partial
from itertools import repeat
from math import prod
from typing import Any, Final, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from floragrad._streams import Stream
from floragrad.jax import quantize, random
from floragrad.jax.leaf import Leaf
from floragrad.jax.options import Options
from floragrad.jax.projection import BucketProjection, GaussianProjection, Projection, stream_key
from floragrad.jax.quantize import Words

UNSPLIT: Final = 2
"""In place of 0 or 1, the halves of a key: the key itself."""


class RandomPool(NamedTuple):
    """Random words of one step for all leaves with equal requests, one row for each leaf.

    Attributes:
        previous_ids: ``projection_id`` of each leaf before this step, (leaves, 3), uint32.
        ids: ``projection_id`` of this step, (leaves, 3), uint32.
        resampled: True where the two differ, (leaves,).
        words: (leaves, requests, words), uint32, each request padded to the longest.
    """

    previous_ids: Array
    ids: Array
    resampled: Array
    words: Array


class LeafDraws(NamedTuple):
    """Random draws of one step of one leaf.

    Attributes:
        projection_id: Seed, leaf index and resample index of this step's projection; an ``optax.MaskedNode`` where the
            leaf draws nothing.
        resampled: True where the sketch is encoded with another projection; may be traced.
        projection: Projection of this step; None without a projection, or with adaptive weights.
        previous: Projection that the sketch is encoded with; None likewise.
        words: Words for rounding; None where nothing is rounded.
    """

    projection_id: Any
    resampled: ArrayLike
    projection: Projection | None
    previous: Projection | None
    words: Words | None


class _Request(NamedTuple):
    """One array of random words.

    Attributes:
        stream: Stream of the leaf.
        half: Half of the stream's key: the number folded in, 0 or 1; ``UNSPLIT`` for the key itself.
        shape: Shape of the words.
    """

    stream: Stream
    half: int
    shape: tuple[int, ...]


def draw_pools(
    leaves: Sequence[Leaf], projection_ids: Sequence[Any], options: Options, count: Array
) -> list[RandomPool | None]:
    """Draw the random words of one step; return the pool of each leaf, None for leaves that draw nothing.

    Args:
        leaves: All leaves of one optimizer.
        projection_ids: ``projection_id`` of each leaf before this step.
        options: Options of the optimizer.
        count: t, from 1, int32.
    """
    groups: dict[tuple[_Request, ...], list[int]] = {}
    for position, leaf in enumerate(leaves):
        if leaf.is_random:
            groups.setdefault(_requests(leaf), []).append(position)
    pools: list[RandomPool | None] = [None] * len(leaves)
    for requests, members in groups.items():
        pool = _pool(requests, jnp.stack([projection_ids[position] for position in members]), options, count)
        for position in members:
            pools[position] = pool
    return pools


def leaf_draws(leaf: Leaf, pool: RandomPool | None, previous_id: Any) -> LeafDraws:
    """Look up the random draws of one leaf by its ``projection_id``.

    The number of its row would be another constant in the code of every leaf, and equal leaves would be compiled one
    by one.

    Args:
        leaf: The leaf.
        pool: Its pool of :func:`draw_pools`.
        previous_id: Its ``projection_id`` before this step.
    """
    if pool is None:
        return LeafDraws(previous_id, False, None, None, None)
    count = len(pool.previous_ids)
    same = jnp.all(pool.previous_ids == previous_id[None], axis=1)
    row = jnp.min(jnp.where(same, lax.iota(jnp.uint32, count), np.uint32(count - 1)))
    projection_id, resampled, drawn = (lax.dynamic_index_in_dim(each, row, keepdims=False) for each in pool[1:])
    words = [drawn[at, : prod(request.shape)].reshape(request.shape) for at, request in enumerate(_requests(leaf))]
    projection: Projection | None
    previous: Projection | None
    if leaf.has_signs:
        projection, previous = (BucketProjection.from_signs(random.signs(each), leaf.plan.width) for each in words[:2])
    else:
        projection, previous = _gaussian(leaf, projection_id, previous_id, resampled)
    rounding = (words[-2], words[-1]) if leaf.storage != "float32" else None
    return LeafDraws(projection_id, resampled, projection, previous, rounding)


def _requests(leaf: Leaf) -> tuple[_Request, ...]:
    """Return requests for the signs of this step and of the one before, and for rounding words of rows and columns."""
    signs = (_Request(Stream.MOMENTUM, UNSPLIT, (leaf.columns,)),) * 2 if leaf.has_signs else ()
    if leaf.storage == "float32":
        return signs
    shapes = quantize.word_shapes(leaf.layout.with_width(leaf.plan.width), leaf.layout.axis)
    return signs + tuple(_Request(Stream.STATE_ROUNDING, half, shape) for half, shape in enumerate(shapes))


def _pool(requests: tuple[_Request, ...], previous_ids: Array, options: Options, count: Array) -> RandomPool:
    indices, seed = previous_ids[:, 1], jnp.asarray(options.seed).astype(jnp.uint32)
    resample_index = lax.div(count, jnp.asarray(options.kappa).astype(jnp.int32))
    ids, rounding_ids = (
        jnp.stack([jnp.full_like(indices, seed), indices, jnp.full_like(indices, counter.astype(jnp.uint32))], axis=1)
        for counter in (resample_index, count)
    )
    resampled = jnp.any(ids != previous_ids, axis=1)
    if not requests:
        return RandomPool(previous_ids, ids, resampled, jnp.zeros((len(previous_ids), 0, 0), jnp.uint32))
    stream_ids = {Stream.MOMENTUM: iter((ids, previous_ids)), Stream.STATE_ROUNDING: repeat(rounding_ids)}
    rows = [_key_rows(next(stream_ids[each.stream]), each) for each in requests]
    draw = partial(_draw, size=max(prod(each.shape) for each in requests))
    words = lax.map(draw, jnp.stack(rows, axis=1).reshape(-1, 4))
    return RandomPool(previous_ids, ids, resampled, words.reshape(len(previous_ids), len(requests), -1))


def _key_rows(ids: Array, request: _Request) -> Array:
    """Return seed, leaf and stream as in :func:`stream_key`, counter, and half: (leaves, 4), uint32."""
    seeds, indices, counters = ids.T
    numbers = len(Stream) * indices + np.uint32(request.stream)
    return jnp.stack([seeds, numbers, counters, jnp.full_like(indices, request.half)], axis=1)


def _draw(row: Array, size: int) -> Array:
    """Draw ``size`` words from the key of a row."""
    seed, number, counter, half = row
    key = random.fold(random.fold((jnp.zeros_like(seed), seed), number), counter)
    one, other = (lax.select(half == UNSPLIT, *each) for each in zip(key, random.fold(key, half), strict=True))
    one, other = random.fold((one, other), lax.iota(jnp.uint32, size))
    words: Array = one ^ other
    return words


def _gaussian(
    leaf: Leaf, projection_id: Array, previous_id: Array, resampled: Array
) -> tuple[Projection | None, Projection | None]:
    """Draw dense projections; the previous one only where it differs, since they are large."""
    if leaf.plan.momentum != "sketch" or leaf.is_adaptive:
        return None, None
    size = leaf.columns, leaf.plan.width

    def draw(identity: Array) -> Projection:
        seed, index, resample_index = identity
        return GaussianProjection.draw(stream_key(seed, index, resample_index, Stream.MOMENTUM), *size)

    projection = draw(projection_id)
    previous: Projection = lax.cond(resampled, lambda: draw(previous_id), lambda: projection)
    return projection, previous
