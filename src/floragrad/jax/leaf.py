"""One leaf of the parameters: its layout, its plan, and the initial state of its momentum."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from floragrad._streams import Stream
from floragrad.jax import quantize
from floragrad.jax.axes import Layout
from floragrad.jax.options import Options
from floragrad.jax.projection import BucketProjection, Projection, draw, normalise_buckets, stream_key
from floragrad.jax.quantize import Stored
from floragrad.jax.sharding import shard_as_param
from floragrad.jax.trees import array_spec
from floragrad.policy import StateDtype, TensorPlan


class LeafState(NamedTuple):
    """State of one leaf between steps; an ``optax.MaskedNode`` for each absent array.

    Attributes:
        mu: Payload of the momentum.
        mu_scale: Scales of ``"int8"`` and ``"int4"``, float32.
        projection_weight: Weights of ``"adaptive"``, (..., n), float32.
        projection_id: Seed, leaf index and resample index of the projection that the sketch is encoded with, uint32.
    """

    mu: Any
    mu_scale: Any
    projection_weight: Any
    projection_id: Any

    @classmethod
    def of(cls, stored: Stored, projection_weight: Any, projection_id: Any) -> "LeafState":
        """Combine a stored momentum with its projection."""
        scale = optax.MaskedNode() if stored.scale is None else stored.scale
        return cls(stored.payload, scale, projection_weight, projection_id)


@dataclass(frozen=True)
class Leaf:
    """One leaf of the parameters.

    Attributes:
        options: Options of the transformation.
        layout: Matrices of the leaf.
        plan: Policy of its momentum.
        index: Position among the leaves at ``init``, which numbers its random streams for good.
    """

    options: Options = field(compare=False)
    layout: Layout
    plan: TensorPlan
    index: int = field(compare=False)

    @property
    def is_adaptive(self) -> bool:
        """True where the projection has adaptive weights."""
        return self.plan.momentum == "sketch" and self.plan.projection == "adaptive"

    @property
    def has_signs(self) -> bool:
        """True where the projection is one of random signs."""
        return self.plan.momentum == "sketch" and self.plan.projection == "sign"

    @property
    def is_random(self) -> bool:
        """True where a step draws random bits: for a projection, or for rounding."""
        return self.plan.momentum == "sketch" or (self.plan.momentum == "whole" and self.storage != "float32")

    @property
    def columns(self) -> int:
        """Number of inputs, n."""
        return self.layout.matrix_shape[self.layout.axis]

    @property
    def storage(self) -> StateDtype:
        """Storage format of the momentum; float32 for leaves without a matrix."""
        return self.plan.state_dtype if self.layout.view else "float32"

    @property
    def specs(self) -> LeafState:
        """Shape and dtype of each array of the state."""
        if self.plan.momentum == "none":
            return LeafState(*[optax.MaskedNode()] * 4)
        shape = self.layout.with_width(self.plan.width)
        weight: Any = optax.MaskedNode()
        if self.is_adaptive:
            weight = array_spec((*self.layout.matrix_shape[:-2], self.columns), jnp.float32)
        identity = array_spec((3,), jnp.uint32) if self.is_random else optax.MaskedNode()
        return LeafState.of(quantize.specs(shape, self.storage, axis=self.layout.axis), weight, identity)

    def key(self, counter: ArrayLike, stream: Stream) -> Array:
        """Return the key of one random stream."""
        return stream_key(self.options.seed, self.index, counter, stream)

    def draw_projection(self, resample_index: ArrayLike) -> Projection:
        """Draw the projection of a resample index; for ``"adaptive"`` the signs that its weights start from."""
        return draw(self.plan.projection, self.key(resample_index, Stream.MOMENTUM), self.columns, self.plan.width)


def init_leaf_state(leaf: Leaf, param: Any) -> LeafState:
    """Return a momentum of zeros, sharded along stacks and outputs as the parameter is."""
    specs = leaf.specs
    if leaf.plan.momentum == "none":
        return specs
    mu, mu_scale = (
        jax.tree.map(lambda spec: shard_as_param(jnp.zeros(spec.shape, spec.dtype), param, leaf.layout), each)
        for each in specs[:2]
    )
    weight = init_adaptive_weight(leaf, param) if leaf.is_adaptive else optax.MaskedNode()
    return LeafState(mu, mu_scale, weight, _first_id(leaf) if leaf.is_random else optax.MaskedNode())


def _first_id(leaf: Leaf) -> Array:
    seed = jnp.asarray(leaf.options.seed).astype(jnp.uint32)
    return jnp.stack([seed, jnp.uint32(leaf.index), jnp.uint32(0)])


def init_adaptive_weight(leaf: Leaf, param: Any) -> Array:
    """Return random signs divided by the norm of their bucket, (..., n), float32."""
    signs = leaf.draw_projection(0)
    assert isinstance(signs, BucketProjection)
    weight = normalise_buckets(signs.weight, leaf.plan.width, signs.weight)
    stacked = jnp.broadcast_to(weight, (*leaf.layout.matrix_shape[:-2], leaf.columns))
    return shard_as_param(stacked, param, leaf.layout, missing_axis=-3 - leaf.layout.axis)
