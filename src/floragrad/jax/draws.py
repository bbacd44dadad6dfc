"""All random numbers of one step, in few draws: each is a loop to compile."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
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


def draw_step(leaves: Sequence[Leaf], projection_ids: Sequence[Any], count: Array) -> list[Draws]:
    """Draw what one step needs for each leaf.

    Args:
        leaves: All leaves of one optimizer.
        projection_ids: Of the state before this step.
        count: t, from 1.
    """
    found = [Draws(each, False, None, None, None) for each in projection_ids]
    drawing = [at for at, leaf in enumerate(leaves) if leaf.draws]
    if not drawing:
        return found
    chosen = [leaves[at] for at in drawing]
    written = [projection_ids[at] for at in drawing]
    current = [_current_id(each, chosen[0].options, count) for each in written]
    keys = _keys(jnp.stack(current), jnp.stack(written), count)
    for row, (at, leaf) in enumerate(zip(drawing, chosen, strict=True)):
        words = iter(_words(leaf, keys[:, row]))
        changed = jnp.any(current[row] != written[row])
        projection: Projection | None
        previous: Projection | None
        if leaf.has_signs:
            projection, previous = (
                BucketProjection.signs(random.signs(next(words)), leaf.plan.width) for _ in range(2)
            )
        else:
            projection, previous = _gaussian(leaf, keys[0, row], keys[1, row], changed)
        rounding = (next(words), next(words)) if leaf.storage != "float32" else None
        found[at] = Draws(current[row], changed, projection, previous, rounding)
    return found


def _current_id(written: Array, options: Options, count: Array) -> Array:
    """Seed, index and epoch of this step's projection; the index stays what it is."""
    seed = jnp.asarray(options.seed).astype(jnp.uint32)
    epoch = (count // jnp.asarray(options.kappa).astype(jnp.int32)).astype(jnp.uint32)
    return jnp.stack([seed, written[1], epoch])


def _keys(current: Array, written: Array, count: Array) -> Array:
    """Keys of the projections of this step and of those before, and of the words of rows and columns: (4, leaves)."""
    steps = jnp.full(len(current), count.astype(jnp.uint32))
    rounding = jnp.stack([current[:, 0], current[:, 1], steps], axis=1)
    seeds, indices, counters = jnp.concatenate([current, written, rounding, rounding]).T
    streams = np.array([Stream.MOMENTUM, Stream.MOMENTUM, Stream.STATE_ROUNDING, Stream.STATE_ROUNDING], np.uint32)
    keys = jax.vmap(stream_key)(seeds, indices, counters, np.repeat(streams, len(current)))
    # Halves of a key are what it is folded with 0 and 1. All are folded, for one loop to compile instead of two.
    halves = jax.vmap(random.fold_in)(keys, np.repeat(np.array([0, 0, 0, 1], np.uint32), len(current)))
    return jnp.concatenate([keys.reshape(4, -1)[:2], halves.reshape(4, -1)[2:]])


def _words(leaf: Leaf, keys: Array) -> list[Array]:
    """Words of this step's signs and of those before, and of rows and columns for rounding; in one draw.

    Leaves of one shape have the same draw, which is compiled once: no leaf's words are a slice of another array.
    """
    requests: list[tuple[Array, tuple[int, ...]]] = []
    if leaf.has_signs:
        requests += [(key, (leaf.columns,)) for key in keys[:2]]
    if leaf.storage != "float32":
        shapes = quantize.word_shapes(leaf.layout.with_inputs(leaf.plan.width), leaf.layout.axis)
        requests += zip(keys[2:], shapes, strict=True)
    return random.words_of_each(requests)


def _gaussian(leaf: Leaf, now: Array, before: Array, changed: Array) -> tuple[Projection | None, Projection | None]:
    """Dense projections, the one before drawn only where it differs: they are large."""
    if leaf.plan.momentum != "sketch" or leaf.learns:
        return None, None
    size = leaf.columns, leaf.plan.width
    projection = GaussianProjection.drawn(now, *size)
    previous: Projection = lax.cond(changed, lambda: GaussianProjection.drawn(before, *size), lambda: projection)
    return projection, previous
