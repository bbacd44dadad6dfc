"""One step of one leaf: the pure update between the buffers of its momentum."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from floragrad._streams import Stream
from floragrad.jax import quantize
from floragrad.jax.axes import Layout
from floragrad.jax.options import Options
from floragrad.jax.projection import BucketProjection, Projection, draw, learn, normalise_buckets, stream_key
from floragrad.jax.quantize import Stored
from floragrad.jax.sharding import like, place, whole_inputs
from floragrad.jax.update import momentum_step
from floragrad.policy import StateDtype, TensorPlan


class Kept(NamedTuple):
    """What is kept of a leaf between steps; an ``optax.MaskedNode`` stands for what is not.

    Attributes:
        mu: The momentum's numbers.
        mu_scale: Their scales in few bits.
        weight: The learnt weights of ``"adaptive"``.
    """

    mu: Any
    mu_scale: Any
    weight: Any


class Step(NamedTuple):
    """What one step makes of a leaf.

    Attributes:
        direction: D, in the shape and dtype of U.
        kept: What is kept of it.
    """

    direction: Array
    kept: Kept


@dataclass(frozen=True)
class Leaf:
    """One leaf of the parameters and what is kept for it.

    Attributes:
        options: Of the transformation.
        layout: The leaf as matrices.
        plan: What is kept.
        index: Its position among the leaves, for the random streams.
    """

    options: Options
    layout: Layout
    plan: TensorPlan
    index: int

    @property
    def learns(self) -> bool:
        """Whether it has weights that are learnt."""
        return self.plan.momentum == "sketch" and self.plan.projection == "adaptive"

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
        return Kept(*[optax.MaskedNode()] * 3)
    shape, axis = leaf.layout.matrices, leaf.layout.axis
    if leaf.layout.view is None:
        zeros = Stored(jnp.zeros(shape, jnp.float32), None)
    else:
        leading = (*shape[:-2], shape[-3 - axis])
        zeros = quantize.zeros(leading, leaf.plan.width, leaf.storage, axis=axis)
    placed = jax.tree.map(lambda each: place(each, param, leaf.layout), zeros)
    return _kept(placed, initial_weight(leaf, param) if leaf.learns else optax.MaskedNode())


def _kept(stored: Stored, weight: Any) -> Kept:
    return Kept(stored.payload, optax.MaskedNode() if stored.scale is None else stored.scale, weight)


def initial_weight(leaf: Leaf, param: Any) -> Array:
    """Random signs over their bucket's norm."""
    signs = leaf.drawn(0)
    assert isinstance(signs, BucketProjection)
    weight = normalise_buckets(signs.weight, leaf.plan.width, signs.weight)
    stacked = jnp.broadcast_to(weight, (*leaf.layout.matrices[:-2], leaf.columns))
    return place(stacked, param, leaf.layout, without=-3 - leaf.layout.axis)


def step_leaf(leaf: Leaf, count: Array, update: Array, kept: Kept) -> Step:
    """D, and what is kept after this step.

    Args:
        leaf: Which one.
        count: t, from 1.
        update: U, in the shape and dtype of its leaf.
        kept: What is kept before it.
    """
    if leaf.plan.momentum == "none":
        return Step(update, kept)
    axis, options = leaf.layout.axis, leaf.options
    matrices = leaf.layout.to_matrices(whole_inputs(update, leaf.layout))
    matrices = matrices.astype(jnp.promote_types(update.dtype, jnp.float32))
    scale = None if isinstance(kept.mu_scale, optax.MaskedNode) else kept.mu_scale
    momentum = quantize.load(Stored(kept.mu, scale), leaf.plan.width, leaf.storage, axis=axis)
    opens, weight = count % options.kappa == 0, kept.weight
    projection: Projection | None = None
    previous: Projection | None = None
    if leaf.learns:
        opens |= count == 1
        projection, previous = _learnt(leaf, matrices, momentum, weight, opens, count)
        weight = projection.weight
    elif leaf.plan.momentum == "sketch":
        epoch = count // options.kappa
        projection = leaf.drawn(epoch)
        previous = lax.cond(opens, lambda: leaf.drawn(epoch - 1), lambda: projection)
    direction, following = momentum_step(
        matrices, momentum, projection, previous, opens, options.decay, residual=options.residual, axis=axis
    )
    key = leaf.key(count, Stream.STATE_ROUNDING)
    stored = quantize.save(following.astype(jnp.float32), leaf.storage, key, axis=axis)
    return Step(like(leaf.layout.from_matrices(direction).astype(update.dtype), update), _kept(stored, weight))


def _learnt(
    leaf: Leaf, matrices: Array, momentum: Array, weight: Array, opens: Array, count: Array
) -> tuple[BucketProjection, BucketProjection]:
    """The adaptive projection of this step, learnt anew where an epoch opens, and that of the step before."""
    width, axis, b1 = leaf.plan.width, leaf.layout.axis, leaf.options.decay
    previous = BucketProjection.normalised(weight, width)

    def renewed() -> Array:
        blended = b1 * previous.decode(momentum, axis=axis) + (1 - b1) * matrices
        key = leaf.key(count // leaf.options.kappa, Stream.ADAPTIVE_NOISE)
        return learn(blended.astype(jnp.float32), weight, width, key, axis=axis)

    return BucketProjection.normalised(lax.cond(opens, renewed, lambda: weight), width), previous
