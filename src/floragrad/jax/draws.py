"""All random words of one step, in one loop for all leaves that draw alike: a loop for each takes long to compile."""

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

WHOLE: Final = 2
"""In place of 0 or 1, a key's halves: the key itself."""


class Pool(NamedTuple):
    """What leaves that draw alike draw in one step, a row for each.

    Attributes:
        written: Their ``projection_id`` before this step, (leaves, 3).
        current: That of this step, (leaves, 3).
        changed: Whether the two differ, (leaves,).
        words: (leaves, draws, words), every draw as long as the longest.
    """

    written: Array
    current: Array
    changed: Array
    words: Array


class Draws(NamedTuple):
    """What one step of a leaf draws.

    Attributes:
        projection_id: Seed, index and epoch of this step's projection; an ``optax.MaskedNode`` where nothing is drawn.
        changed: Whether the sketch is written in another one.
        projection: That of this step; None where nothing is projected, or where its weights are learnt.
        previous: The one that the sketch is written in; None likewise.
        words: For rounding; None where nothing is rounded.
    """

    projection_id: Any
    changed: ArrayLike
    projection: Projection | None
    previous: Projection | None
    words: Words | None


class _Request(NamedTuple):
    """One draw of words.

    Attributes:
        stream: Of the tensor.
        half: Which half of the stream's key: what it is folded with, 0 or 1; or ``WHOLE``, all of it.
        shape: Of the words.
    """

    stream: Stream
    half: int
    shape: tuple[int, ...]


def draw_pools(
    leaves: Sequence[Leaf], projection_ids: Sequence[Any], options: Options, count: Array
) -> list[Pool | None]:
    """Draw what one step needs; for each leaf the pool that it finds its row in, None where it draws nothing.

    Args:
        leaves: All leaves of one optimizer.
        projection_ids: Of the state before this step.
        options: The optimizer's.
        count: t, from 1.
    """
    alike: dict[tuple[_Request, ...], list[int]] = {}
    for at, leaf in enumerate(leaves):
        if leaf.draws:
            alike.setdefault(_requests(leaf), []).append(at)
    found: list[Pool | None] = [None] * len(leaves)
    for requests, members in alike.items():
        pool = _pool(requests, jnp.stack([projection_ids[at] for at in members]), options, count)
        for at in members:
            found[at] = pool
    return found


def draws_of(leaf: Leaf, pool: Pool | None, written: Any) -> Draws:
    """What one leaf draws, looked up by its ``projection_id``.

    A row's number would be another constant in the code of every leaf, and equal leaves would be compiled one by one.

    Args:
        leaf: Which one.
        pool: From :func:`draw_pools`.
        written: Its ``projection_id`` before this step.
    """
    if pool is None:
        return Draws(written, False, None, None, None)
    count = len(pool.written)
    same = jnp.all(pool.written == written[None], axis=1)
    row = jnp.min(jnp.where(same, lax.iota(jnp.uint32, count), np.uint32(count - 1)))
    current, changed, drawn = (lax.dynamic_index_in_dim(each, row, keepdims=False) for each in pool[1:])
    words = [drawn[at, : prod(request.shape)].reshape(request.shape) for at, request in enumerate(_requests(leaf))]
    projection: Projection | None
    previous: Projection | None
    if leaf.has_signs:
        projection, previous = (BucketProjection.signs(random.signs(each), leaf.plan.width) for each in words[:2])
    else:
        projection, previous = _gaussian(leaf, current, written, changed)
    return Draws(current, changed, projection, previous, (words[-2], words[-1]) if leaf.storage != "float32" else None)


def _requests(leaf: Leaf) -> tuple[_Request, ...]:
    """This step's signs and those before, and words of rows and of columns for rounding."""
    signs = (_Request(Stream.MOMENTUM, WHOLE, (leaf.columns,)),) * 2 if leaf.has_signs else ()
    if leaf.storage == "float32":
        return signs
    shapes = quantize.word_shapes(leaf.layout.with_inputs(leaf.plan.width), leaf.layout.axis)
    return signs + tuple(_Request(Stream.STATE_ROUNDING, half, shape) for half, shape in enumerate(shapes))


def _pool(requests: tuple[_Request, ...], written: Array, options: Options, count: Array) -> Pool:
    indices, seed = written[:, 1], jnp.asarray(options.seed).astype(jnp.uint32)
    epoch = lax.div(count, jnp.asarray(options.kappa).astype(jnp.int32))
    current, rounding = (
        jnp.stack([jnp.full_like(indices, seed), indices, jnp.full_like(indices, each.astype(jnp.uint32))], axis=1)
        for each in (epoch, count)
    )
    changed = jnp.any(current != written, axis=1)
    if not requests:
        return Pool(written, current, changed, jnp.zeros((len(written), 0, 0), jnp.uint32))
    ids = {Stream.MOMENTUM: iter((current, written)), Stream.STATE_ROUNDING: repeat(rounding)}
    rows = [_key_rows(next(ids[each.stream]), each) for each in requests]
    draw = partial(_draw, size=max(prod(each.shape) for each in requests))
    words = lax.map(draw, jnp.stack(rows, axis=1).reshape(-1, 4))
    return Pool(written, current, changed, words.reshape(len(written), len(requests), -1))


def _key_rows(ids: Array, request: _Request) -> Array:
    """Seed, tensor and stream as in :func:`stream_key`, counter, and half: (leaves, 4)."""
    seeds, indices, counters = ids.T
    numbers = len(Stream) * indices + np.uint32(request.stream)
    return jnp.stack([seeds, numbers, counters, jnp.full_like(indices, request.half)], axis=1)


def _draw(row: Array, size: int) -> Array:
    """As many words of a row's key."""
    seed, number, counter, half = row
    key = random.fold(random.fold((jnp.zeros_like(seed), seed), number), counter)
    one, other = (lax.select(half == WHOLE, *each) for each in zip(key, random.fold(key, half), strict=True))
    one, other = random.fold((one, other), lax.iota(jnp.uint32, size))
    words: Array = one ^ other
    return words


def _gaussian(
    leaf: Leaf, current: Array, written: Array, changed: Array
) -> tuple[Projection | None, Projection | None]:
    """Dense projections, the one before drawn only where it differs: they are large."""
    if leaf.plan.momentum != "sketch" or leaf.learns:
        return None, None
    size = leaf.columns, leaf.plan.width

    def drawn(projection_id: Array) -> Projection:
        seed, index, epoch = projection_id
        return GaussianProjection.drawn(stream_key(seed, index, epoch, Stream.MOMENTUM), *size)

    projection = drawn(current)
    previous: Projection = lax.cond(changed, lambda: drawn(written), lambda: projection)
    return projection, previous
