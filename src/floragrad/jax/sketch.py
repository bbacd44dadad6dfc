"""A tree of gradients kept as sketches: what is stored between micro-batches, not when."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from floragrad._checks import SHARED_CHECKS, accumulator_contradictions, check_contradictions, check_value
from floragrad._streams import Stream
from floragrad.jax import quantize, random
from floragrad.jax.axes import Layout, MatrixAxesOrFn, layouts
from floragrad.jax.precision import as_arrays
from floragrad.jax.projection import Projection, draw
from floragrad.jax.quantize import Stored, Words
from floragrad.jax.sharding import input_shards, like, place, whole_inputs
from floragrad.policy import QUANTIZATION_BLOCK, AccumulatorPlan, StateDtype, plan_accumulator
from floragrad.policy import Projection as ProjectionKind


@dataclass(frozen=True)
class LeafSketch:
    """C ← C + w·encode(G) of one leaf; decode(C) is the sum of w·G in the mean.

    At ρ = 1 nothing is projected and only the bits are few; with float32 as well the sum is exact.

    Attributes:
        layout: The leaf as matrices.
        plan: What is kept.
    """

    layout: Layout
    plan: AccumulatorPlan

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers that are kept."""
        return self.layout.with_inputs(self.plan.width)

    def empty(self, leaf: Any) -> Stored:
        """No gradient, sharded as the leaf is.

        Args:
            leaf: The leaf, or anything with its shape and sharding.
        """
        leading = list(self.layout.matrices)
        if self.layout.view is None:
            kept = Stored(jnp.zeros(leading, jnp.float32), None)
        else:
            del leading[self.layout.axis]
            kept = quantize.zeros(tuple(leading), self.plan.width, self.plan.state_dtype, axis=self.layout.axis)
        inputs = self._keeps_inputs_apart(leaf)
        placed: Stored = jax.tree.map(lambda each: place(each, leaf, self.layout, inputs=inputs), kept)
        return placed

    def add(
        self, kept: Stored, grad: Array, weight: ArrayLike, projection: Projection | None, words: Words | None
    ) -> Stored:
        """Fold a gradient in.

        Args:
            kept: C.
            grad: G.
            weight: w.
            projection: Of this window; None at ρ = 1.
            words: Of the rounding, others for every fold; None where nothing is rounded.
        """
        where = grad if self._keeps_inputs_apart(grad) else whole_inputs(grad, self.layout)
        fresh = self.layout.to_matrices(where).astype(jnp.float32)
        if projection is not None:
            fresh = projection.encode(fresh, axis=self.layout.axis)
        total = self._load(kept) + fresh * weight
        return quantize.save_with_words(total, self.plan.state_dtype, words, axis=self.layout.axis)

    def decode(self, kept: Stored, projection: Projection | None, leaf: Any) -> Array:
        """The sum of w·G in the mean, float32, sharded as the leaf is."""
        rows = self._load(kept)
        if projection is not None:
            rows = projection.decode(rows, axis=self.layout.axis)
        return like(self.layout.from_matrices(rows), leaf)

    def _keeps_inputs_apart(self, leaf: Any) -> bool:
        """Whether inputs that are sharded stay so: where every device has whole blocks of all columns."""
        return (
            self.plan.ratio == 1
            and self.plan.view.columns % (QUANTIZATION_BLOCK * input_shards(leaf, self.layout)) == 0
        )

    def _load(self, kept: Stored) -> Array:
        return quantize.load(kept, self.plan.width, self.plan.state_dtype, axis=self.layout.axis)


@dataclass(frozen=True)
class Sketches:
    """How a tree of gradients is kept: one :class:`~floragrad.jax.quantize.Stored` of trees like it.

    In the tree of scales, :class:`optax.MaskedNode` stands where there is none.
    """

    ratio: int
    rank: int | None
    state_dtype: StateDtype
    projection: ProjectionKind
    matrix_axes: MatrixAxesOrFn

    def leaves(self, tree: Any) -> list[LeafSketch]:
        """What is kept of each leaf, from its shape alone."""
        return [LeafSketch(layout, self._plan(layout)) for layout in layouts(tree, self.matrix_axes)]

    def empty(self, tree: Any) -> Stored:
        """No gradients, for a tree of parameters, gradients or anything with a shape."""
        tree = as_arrays(tree)
        return _together(tree, [leaf.empty(each) for leaf, each in self._leaves(tree)])

    def add(self, kept: Stored, grads: Any, weight: ArrayLike, window: Array, fold: ArrayLike) -> Stored:
        """Fold a tree of gradients in.

        Args:
            kept: From :meth:`empty` or the fold before.
            grads: The gradients.
            weight: Of all of them.
            window: A key; another one for every window.
            fold: How many folds there were before in this window.
        """
        grads = as_arrays(grads)
        leaves = self.leaves(grads)
        key = random.fold_in(random.fold_in(window, int(Stream.ACCUMULATOR_ROUNDING)), fold)
        each = zip(
            self._leaves(grads), _apart(grads, kept), self._drawn(leaves, window), _words(leaves, key), strict=True
        )
        return _together(
            grads, [leaf.add(one, grad, weight, projection, words) for (leaf, grad), one, projection, words in each]
        )

    def decode(self, kept: Stored, like: Any, window: Array) -> Any:
        """The weighted sum of the gradients in the mean, float32.

        Args:
            kept: The sketches.
            like: A tree with the gradients' shapes and shardings.
            window: The key of the window.
        """
        each = zip(self._leaves(like), _apart(like, kept), self._drawn(self.leaves(like), window), strict=True)
        structure: Any = jax.tree.structure(like)
        return structure.unflatten(leaf.decode(one, projection, other) for (leaf, other), one, projection in each)

    def _leaves(self, tree: Any) -> Iterator[tuple[LeafSketch, Any]]:
        return zip(self.leaves(tree), jax.tree.leaves(tree), strict=True)

    def _plan(self, layout: Layout) -> AccumulatorPlan:
        # A leaf without matrices is one vector to the policy, whatever its shape.
        shape = layout.shape if layout.view else (prod(layout.shape),)
        return plan_accumulator(shape, ratio=self.ratio, rank=self.rank, state_dtype=self.state_dtype, view=layout.view)

    def _drawn(self, leaves: list[LeafSketch], window: Array) -> list[Projection | None]:
        """The projections of a window; None where every column is kept."""
        plans = [leaf.plan for leaf in leaves]
        keys = random.split(random.fold_in(window, int(Stream.ACCUMULATOR)), len(leaves))
        return [
            draw(self.projection, key, plan.view.columns, plan.width) if plan.ratio > 1 else None
            for plan, key in zip(plans, keys, strict=True)
        ]


def _together(tree: Any, each: list[Stored]) -> Stored:
    """A tree of payloads and a tree of scales, for what can hold arrays only at the places of a tree's leaves."""
    structure: Any = jax.tree.structure(tree)
    scales = (optax.MaskedNode() if one.scale is None else one.scale for one in each)
    return Stored(structure.unflatten(one.payload for one in each), structure.unflatten(scales))


def _apart(tree: Any, kept: Stored) -> list[Stored]:
    """The inverse of :func:`_together`."""
    structure: Any = jax.tree.structure(tree)
    each = zip(structure.flatten_up_to(kept.payload), structure.flatten_up_to(kept.scale), strict=True)
    return [Stored(payload, None if isinstance(scale, optax.MaskedNode) else scale) for payload, scale in each]


def _words(leaves: list[LeafSketch], key: Array) -> list[Words | None]:
    """Random words for each leaf that is rounded, drawn at once for all of one shape."""
    rounded = [(leaf.shape, leaf.layout.axis) if leaf.plan.state_dtype != "float32" else None for leaf in leaves]
    drawn = {
        each: iter(quantize.random_words(random.fold_in(key, index), *each, count))
        for index, (each, count) in enumerate(Counter(filter(None, rounded)).items())
    }
    return [next(drawn[each]) if each else None for each in rounded]


def checked_sketches(
    ratio: int,
    rank: int | None,
    state_dtype: StateDtype | DTypeLike,
    projection: ProjectionKind,
    matrix_axes: MatrixAxesOrFn,
) -> Sketches:
    """How gradients are kept, from an accumulator's options.

    Raises:
        ValueError: An option has a wrong value, or two options contradict each other.
    """
    dtype: Any = state_dtype if isinstance(state_dtype, str) else jnp.dtype(state_dtype).name
    options = {"ratio": ratio, "rank": rank, "state_dtype": dtype, "projection": projection}
    for name, value in options.items():
        check_value(name, value, SHARED_CHECKS[name])
    check_contradictions(accumulator_contradictions(options))
    return Sketches(ratio, rank, dtype, projection, matrix_axes)
