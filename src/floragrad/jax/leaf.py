"""One leaf of the parameters: how it is seen, what is kept for it, and what that begins as."""

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
from floragrad.jax.sharding import place
from floragrad.policy import StateDtype, TensorPlan


class Kept(NamedTuple):
    """What is kept of a leaf between steps; an ``optax.MaskedNode`` stands for what is not.

    Attributes:
        mu: The momentum's numbers.
        mu_scale: Their scales in few bits.
        weight: The learnt weights of ``"adaptive"``.
        projection_id: Seed, index and epoch of the projection that the sketch is written in.
    """

    mu: Any
    mu_scale: Any
    weight: Any
    projection_id: Any


@dataclass(frozen=True)
class Leaf:
    """One leaf of the parameters and what is kept for it.

    Attributes:
        options: Of the transformation.
        layout: The leaf as matrices.
        plan: What is kept.
        index: Its position among the leaves where its state begins, which numbers its random streams for good.
    """

    options: Options = field(compare=False)
    layout: Layout
    plan: TensorPlan
    index: int = field(compare=False)

    @property
    def learns(self) -> bool:
        """Whether it has weights that are learnt."""
        return self.plan.momentum == "sketch" and self.plan.projection == "adaptive"

    @property
    def has_signs(self) -> bool:
        """Whether its projection is drawn as signs."""
        return self.plan.momentum == "sketch" and self.plan.projection == "sign"

    @property
    def draws(self) -> bool:
        """Whether a step of it draws random numbers: for a projection, or for rounding."""
        return self.plan.momentum == "sketch" or (self.plan.momentum == "whole" and self.storage != "float32")

    @property
    def columns(self) -> int:
        """How many inputs there are."""
        return self.layout.matrices[self.layout.axis]

    @property
    def storage(self) -> StateDtype:
        """How the momentum is stored: in float32 where it is no matrix."""
        return self.plan.state_dtype if self.layout.view else "float32"

    def key(self, counter: ArrayLike, stream: Stream) -> Array:
        """The key of one of its streams."""
        return stream_key(self.options.seed, self.index, counter, stream)

    def drawn(self, epoch: ArrayLike) -> Projection:
        """The projection of an epoch, drawn; of ``"adaptive"`` the signs that its weights start from."""
        return draw(self.plan.projection, self.key(epoch, Stream.MOMENTUM), self.columns, self.plan.width)


def initial(leaf: Leaf, param: Any) -> Kept:
    """A momentum of zeros, sharded along stacks and outputs like the parameter."""
    if leaf.plan.momentum == "none":
        return Kept(*[optax.MaskedNode()] * 4)
    shape, axis = leaf.layout.matrices, leaf.layout.axis
    if leaf.layout.view is None:
        zeros = Stored(jnp.zeros(shape, jnp.float32), None)
    else:
        leading = (*shape[:-2], shape[-3 - axis])
        zeros = quantize.zeros(leading, leaf.plan.width, leaf.storage, axis=axis)
    placed = jax.tree.map(lambda each: place(each, param, leaf.layout), zeros)
    weight = initial_weight(leaf, param) if leaf.learns else optax.MaskedNode()
    return kept_as(placed, weight, _first_id(leaf) if leaf.draws else optax.MaskedNode())


def kept_as(stored: Stored, weight: Any, projection_id: Any) -> Kept:
    """The parts of a state."""
    return Kept(stored.payload, optax.MaskedNode() if stored.scale is None else stored.scale, weight, projection_id)


def _first_id(leaf: Leaf) -> Array:
    seed = jnp.asarray(leaf.options.seed).astype(jnp.uint32)
    return jnp.stack([seed, jnp.uint32(leaf.index), jnp.uint32(0)])


def initial_weight(leaf: Leaf, param: Any) -> Array:
    """Random signs over their bucket's norm."""
    signs = leaf.drawn(0)
    assert isinstance(signs, BucketProjection)
    weight = normalise_buckets(signs.weight, leaf.plan.width, signs.weight)
    stacked = jnp.broadcast_to(weight, (*leaf.layout.matrices[:-2], leaf.columns))
    return place(stacked, param, leaf.layout, without=-3 - leaf.layout.axis)
