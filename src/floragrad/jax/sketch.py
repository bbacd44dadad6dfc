"""Sketches of a tree of gradients between micro-batches."""

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
from floragrad.jax.sharding import input_shard_count, replicate_inputs, reshard_like, shard_as_param
from floragrad.jax.state_checks import check_leaf_state
from floragrad.policy import QUANTIZATION_BLOCK, AccumulatorPlan, StateDtype, plan_accumulator
from floragrad.policy import Projection as ProjectionKind


@dataclass(frozen=True)
class LeafSketch:
    """C ← C + w·encode(G) of one leaf; E[decode(C)] is the sum of w·G.

    At ρ = 1 there is no projection, only quantization; in float32 the sum is then exact.

    Attributes:
        layout: Matrices of the leaf.
        plan: Policy of the sketch.
    """

    layout: Layout
    plan: AccumulatorPlan

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of C before it is packed."""
        return self.layout.with_width(self.plan.width)

    @property
    def specs(self) -> Stored:
        """Shape and dtype of each stored array."""
        return quantize.specs(self.shape, self.plan.state_dtype, axis=self.layout.axis)

    def init(self, leaf: Any) -> Stored:
        """Return a sketch of zeros, sharded as the leaf is.

        Args:
            leaf: The leaf, or anything with its shape and sharding.
        """
        shard_inputs = self._keeps_inputs_sharded(leaf)

        def zeros(spec: Any) -> Array:
            return shard_as_param(jnp.zeros(spec.shape, spec.dtype), leaf, self.layout, shard_inputs=shard_inputs)

        stored: Stored = jax.tree.map(zeros, self.specs)
        return stored

    def add(
        self, sketch: Stored, grad: Array, weight: ArrayLike, projection: Projection | None, words: Words | None
    ) -> Stored:
        """Add a gradient.

        Args:
            sketch: C.
            grad: G.
            weight: w.
            projection: Projection of the window; None at ρ = 1.
            words: Words for rounding, new for each micro-batch; None for float32.
        """
        grad = grad if self._keeps_inputs_sharded(grad) else replicate_inputs(grad, self.layout)
        matrices = self.layout.to_matrices(grad).astype(jnp.float32)
        if projection is not None:
            matrices = projection.encode(matrices, axis=self.layout.axis)
        total = self._load(sketch) + matrices * weight
        return quantize.save_with_words(total, self.plan.state_dtype, words, axis=self.layout.axis)

    def decode(self, sketch: Stored, projection: Projection | None, leaf: Any) -> Array:
        """Return an unbiased estimate of the sum of w·G, float32, sharded as the leaf is."""
        rows = self._load(sketch)
        if projection is not None:
            rows = projection.decode(rows, axis=self.layout.axis)
        return reshard_like(self.layout.from_matrices(rows), leaf)

    def _keeps_inputs_sharded(self, leaf: Any) -> bool:
        """Return True where each shard of the inputs is a whole number of quantization blocks at ρ = 1."""
        return (
            self.plan.ratio == 1
            and self.plan.view.columns % (QUANTIZATION_BLOCK * input_shard_count(leaf, self.layout)) == 0
        )

    def _load(self, sketch: Stored) -> Array:
        return quantize.load(sketch, self.plan.width, self.plan.state_dtype, axis=self.layout.axis)


@dataclass(frozen=True)
class TreeSketch:
    """Options of the sketches of a tree of gradients.

    The sketches are one :class:`~floragrad.jax.quantize.Stored` of two trees like the gradients': payloads, and scales
    with an :class:`optax.MaskedNode` for leaves without.
    """

    ratio: int
    rank: int | None
    state_dtype: StateDtype
    projection: ProjectionKind
    matrix_axes: MatrixAxesOrFn

    def leaves(self, tree: Any) -> list[LeafSketch]:
        """Return the sketch of each leaf, from shapes alone."""
        return [LeafSketch(layout, self._plan(layout)) for layout in layouts(tree, self.matrix_axes)]

    def init(self, tree: Any) -> Stored:
        """Return sketches of zeros for a tree of parameters, gradients or anything with a shape."""
        tree = as_arrays(tree)
        return _to_trees(tree, [leaf.init(each) for leaf, each in self._leaves(tree)])

    def add(self, sketches: Stored, grads: Any, weight: ArrayLike, window: Array, mini_step: ArrayLike) -> Stored:
        """Add a tree of gradients.

        Args:
            sketches: Sketches of :meth:`init` or of the micro-batch before.
            grads: The gradients.
            weight: w, one for all leaves.
            window: Key of the window.
            mini_step: Number of micro-batches added to this window before.
        """
        grads = as_arrays(grads)
        leaves = self.leaves(grads)
        key = random.fold_in(random.fold_in(window, int(Stream.ACCUMULATOR_ROUNDING)), mini_step)
        each = zip(
            self._leaves(grads),
            _to_leaves(grads, leaves, sketches),
            self._projections(leaves, window),
            _rounding_words(leaves, key),
            strict=True,
        )
        return _to_trees(
            grads, [leaf.add(one, grad, weight, projection, words) for (leaf, grad), one, projection, words in each]
        )

    def decode(self, sketches: Stored, like: Any, window: Array) -> Any:
        """Return an unbiased estimate of the weighted sum of the gradients, float32.

        Args:
            sketches: The sketches.
            like: A tree with the gradients' shapes and shardings.
            window: Key of the window.
        """
        leaves = self.leaves(like)
        each = zip(
            self._leaves(like), _to_leaves(like, leaves, sketches), self._projections(leaves, window), strict=True
        )
        structure: Any = jax.tree.structure(like)
        return structure.unflatten(leaf.decode(one, projection, other) for (leaf, other), one, projection in each)

    def _leaves(self, tree: Any) -> Iterator[tuple[LeafSketch, Any]]:
        return zip(self.leaves(tree), jax.tree.leaves(tree), strict=True)

    def _plan(self, layout: Layout) -> AccumulatorPlan:
        # A leaf without matrices is one vector to the policy, whatever its shape.
        shape = layout.shape if layout.view else (prod(layout.shape),)
        return plan_accumulator(shape, ratio=self.ratio, rank=self.rank, state_dtype=self.state_dtype, view=layout.view)

    def _projections(self, leaves: list[LeafSketch], window: Array) -> list[Projection | None]:
        """Draw the projections of a window; None at ρ = 1."""
        plans = [leaf.plan for leaf in leaves]
        keys = random.split(random.fold_in(window, int(Stream.ACCUMULATOR)), len(leaves))
        return [
            draw(self.projection, key, plan.view.columns, plan.width) if plan.ratio > 1 else None
            for plan, key in zip(plans, keys, strict=True)
        ]


def _to_trees(tree: Any, leaves: list[Stored]) -> Stored:
    """Return a tree of payloads and a tree of scales: some containers hold nothing but an array at each leaf."""
    structure: Any = jax.tree.structure(tree)
    scales = (optax.MaskedNode() if leaf.scale is None else leaf.scale for leaf in leaves)
    return Stored(structure.unflatten(leaf.payload for leaf in leaves), structure.unflatten(scales))


def _to_leaves(tree: Any, leaves: list[LeafSketch], sketches: Stored) -> list[Stored]:
    """Return the inverse of :func:`_to_trees`, checked against the shapes and dtypes of the leaves.

    Raises:
        ValueError: An array has another shape or dtype than its leaf asks for.
    """
    structure: Any
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    each = zip(structure.flatten_up_to(sketches.payload), structure.flatten_up_to(sketches.scale), strict=True)
    found = [Stored(payload, None if isinstance(scale, optax.MaskedNode) else scale) for payload, scale in each]
    for (path, _), leaf, stored in zip(paths, leaves, found, strict=True):
        check_leaf_state(path, stored, leaf.specs)
    return found


def _rounding_words(leaves: list[LeafSketch], key: Array) -> list[Words | None]:
    """Draw random words for each leaf that is rounded, at once for all leaves of one shape."""
    rounded = [(leaf.shape, leaf.layout.axis) if leaf.plan.state_dtype != "float32" else None for leaf in leaves]
    drawn = {
        each: iter(quantize.random_words(random.fold_in(key, index), *each, count))
        for index, (each, count) in enumerate(Counter(filter(None, rounded)).items())
    }
    return [next(drawn[each]) if each else None for each in rounded]


def make_tree_sketch(
    ratio: int,
    rank: int | None,
    state_dtype: StateDtype | DTypeLike,
    projection: ProjectionKind,
    matrix_axes: MatrixAxesOrFn,
) -> TreeSketch:
    """Check an accumulator's options.

    Raises:
        ValueError: An option has a wrong value, or two options contradict each other.
    """
    dtype: Any = state_dtype if isinstance(state_dtype, str) else jnp.dtype(state_dtype).name
    options = {"ratio": ratio, "rank": rank, "state_dtype": dtype, "projection": projection}
    for name, value in options.items():
        check_value(name, value, SHARED_CHECKS[name])
    check_contradictions(accumulator_contradictions(options))
    return TreeSketch(ratio, rank, dtype, projection, matrix_axes)
