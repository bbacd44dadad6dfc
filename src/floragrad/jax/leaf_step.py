"""One step of one leaf: decode the stored momentum, update it, and store it again."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import Array, lax

from floragrad._streams import Stream
from floragrad.jax import quantize
from floragrad.jax.draws import RandomPool, leaf_draws
from floragrad.jax.leaf import Leaf, LeafState
from floragrad.jax.projection import BucketProjection, adaptive_weights, stream_key
from floragrad.jax.quantize import Stored
from floragrad.jax.sharding import replicate_inputs, reshard_like
from floragrad.jax.update import momentum_step


class LeafStep(NamedTuple):
    """Result of one step of one leaf.

    Attributes:
        direction: D, in the shape and dtype of U.
        state: State after the step.
    """

    direction: Array
    state: LeafState


def step_leaf(leaf: Leaf, count: Array, update: Array, state: LeafState, pool: RandomPool | None) -> LeafStep:
    """Compute D and the state after this step.

    Args:
        leaf: Layout, plan and options.
        count: t, from 1, int32.
        update: U, in the shape and dtype of the leaf.
        state: State before this step.
        pool: Random words of this leaf and all others of its kind; None where none are needed.
    """
    if leaf.plan.momentum == "none":
        return LeafStep(update, state)
    axis, options = leaf.layout.axis, leaf.options
    projection_id, resampled, projection, previous, words = leaf_draws(leaf, pool, state.projection_id)
    matrices = leaf.layout.to_matrices(replicate_inputs(update, leaf.layout))
    matrices = matrices.astype(jnp.promote_types(update.dtype, jnp.float32))
    scale = None if isinstance(state.mu_scale, optax.MaskedNode) else state.mu_scale
    momentum = quantize.load(Stored(state.mu, scale), leaf.plan.width, leaf.storage, axis=axis)
    weight = state.projection_weight
    if leaf.is_adaptive:
        resampled = jnp.logical_or(resampled, count == 1)
        projection, previous = _adaptive_projections(leaf, matrices, momentum, weight, resampled, projection_id)
        weight = projection.weight
    direction, new_momentum = momentum_step(
        matrices, momentum, projection, previous, resampled, options.decay, residual=options.residual, axis=axis
    )
    stored = quantize.save_with_words(new_momentum.astype(jnp.float32), leaf.storage, words, axis=axis)
    updates = leaf.layout.from_matrices(direction).astype(update.dtype)
    return LeafStep(reshard_like(updates, update), LeafState.of(stored, weight, projection_id))


def _adaptive_projections(
    leaf: Leaf, matrices: Array, momentum: Array, weight: Array, resampled: Array, projection_id: Array
) -> tuple[BucketProjection, BucketProjection]:
    """Return the adaptive projections of this step, adapted anew where it resamples, and of the step before."""
    width, axis, b1 = leaf.plan.width, leaf.layout.axis, leaf.options.decay
    previous = BucketProjection.from_unit_weight(weight, width)

    def adapt() -> Array:
        blended = b1 * previous.decode(momentum, axis=axis) + (1 - b1) * matrices
        seed, index, resample_index = projection_id
        key = stream_key(seed, index, resample_index, Stream.ADAPTIVE_NOISE)
        return adaptive_weights(blended.astype(jnp.float32), weight, width, key, axis=axis)

    return BucketProjection.from_unit_weight(lax.cond(resampled, adapt, lambda: weight), width), previous
