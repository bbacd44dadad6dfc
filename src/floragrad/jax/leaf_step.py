"""One step of one leaf: the pure update between the buffers of its momentum."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import Array, lax

from floragrad._streams import Stream
from floragrad.jax import quantize
from floragrad.jax.draws import Pool, draws_of
from floragrad.jax.leaf import Kept, Leaf, kept_as
from floragrad.jax.projection import BucketProjection, learn, stream_key
from floragrad.jax.quantize import Stored
from floragrad.jax.sharding import like, whole_inputs
from floragrad.jax.update import momentum_step


class Step(NamedTuple):
    """What one step makes of a leaf.

    Attributes:
        direction: D, in the shape and dtype of U.
        kept: What is kept of it.
    """

    direction: Array
    kept: Kept


def step_leaf(leaf: Leaf, count: Array, update: Array, kept: Kept, pool: Pool | None) -> Step:
    """D, and what is kept after this step.

    Args:
        leaf: Which one.
        count: t, from 1.
        update: U, in the shape and dtype of its leaf.
        kept: What is kept before it.
        pool: What it draws, and leaves like it.
    """
    if leaf.plan.momentum == "none":
        return Step(update, kept)
    axis, options = leaf.layout.axis, leaf.options
    projection_id, changed, projection, previous, words = draws_of(leaf, pool, kept.projection_id)
    matrices = leaf.layout.to_matrices(whole_inputs(update, leaf.layout))
    matrices = matrices.astype(jnp.promote_types(update.dtype, jnp.float32))
    scale = None if isinstance(kept.mu_scale, optax.MaskedNode) else kept.mu_scale
    momentum = quantize.load(Stored(kept.mu, scale), leaf.plan.width, leaf.storage, axis=axis)
    weight = kept.weight
    if leaf.learns:
        changed = jnp.logical_or(changed, count == 1)
        projection, previous = _learnt(leaf, matrices, momentum, weight, changed, projection_id)
        weight = projection.weight
    direction, following = momentum_step(
        matrices, momentum, projection, previous, changed, options.decay, residual=options.residual, axis=axis
    )
    stored = quantize.save_with_words(following.astype(jnp.float32), leaf.storage, words, axis=axis)
    moved = leaf.layout.from_matrices(direction).astype(update.dtype)
    return Step(like(moved, update), kept_as(stored, weight, projection_id))


def _learnt(
    leaf: Leaf, matrices: Array, momentum: Array, weight: Array, opens: Array, projection_id: Array
) -> tuple[BucketProjection, BucketProjection]:
    """The adaptive projection of this step, learnt anew where an epoch opens, and that of the step before."""
    width, axis, b1 = leaf.plan.width, leaf.layout.axis, leaf.options.decay
    previous = BucketProjection.normalised(weight, width)

    def renewed() -> Array:
        blended = b1 * previous.decode(momentum, axis=axis) + (1 - b1) * matrices
        seed, index, epoch = projection_id
        key = stream_key(seed, index, epoch, Stream.ADAPTIVE_NOISE)
        return learn(blended.astype(jnp.float32), weight, width, key, axis=axis)

    return BucketProjection.normalised(lax.cond(opens, renewed, lambda: weight), width), previous
