"""Sketches in place of a gradient tree inside ``optax.microbatching``."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from floragrad.jax.axes import MatrixAxesOrFn
from floragrad.jax.precision import as_arrays
from floragrad.jax.sharding import abstract_as
from floragrad.jax.sketch import checked_sketches
from floragrad.policy import Projection, StateDtype


def sketch_accumulator(
    key: Array,
    num_microbatches: ArrayLike | None = None,
    *,
    ratio: int = 1,
    rank: int | None = None,
    state_dtype: StateDtype | DTypeLike = "int4",
    projection: Projection = "sign",
    matrix_axes: MatrixAxesOrFn = None,
) -> optax.microbatching.Accumulator:
    """Sum or average gradients over micro-batches in a sketch, a few bits for each number.

    For the gradients g₁ … g_N of a window, with w = 1 or 1/N::

        C ← C + w · encode(gᵢ)          result = decode(C),   E[result] = w · Σ gᵢ

    C is rounded stochastically after every micro-batch. The defaults keep every column, in four bits: an eighth of
    the gradients' bytes, plus a sixteenth for scales. Vectors, and what few bits would not make smaller, are summed
    exactly; vocabulary-like matrices keep every column whatever the ratio.

    Projection and rounding are drawn from ``key``, so give every window another one, or errors repeat instead of
    averaging out over training: build the accumulator inside the jitted step, with a key that is folded from the
    step number. Nothing is recompiled for it.

    The interface of :class:`optax.microbatching.Accumulator` has no place for a last gradient that is not
    folded in: all N pass through the sketch. In :func:`compressed_multi_steps` the last one stays whole.

    ``optax.microbatching.micro_grad`` takes the gradient of each example by itself and lays those of a micro-batch
    side by side. Where only their sum is wanted, ``optax.microbatching.microbatch`` around ``jax.grad`` holds one
    gradient for each micro-batch.

    Args:
        key: A key of ``jax.random``, another one for every window.
        num_microbatches: N, to average, as ``AccumulationType.MEAN`` does; default None sums, as ``SUM`` does.
        ratio: ρ: how many columns (inputs) share one number of the sketch; default 1.
        rank: r, of which ρ is derived for each matrix, min(m, n) // r; default None goes by ``ratio``.
        state_dtype: ``"int4"`` (the default), ``"int8"``, ``"bfloat16"`` or ``"float32"``.
        projection: ``"sign"`` (the default) or the paper's ``"gaussian"``; without effect at ρ = 1.
        matrix_axes: Which axes are inputs and outputs, as for :func:`floragrad.jax.scale_by_flora`.

    Raises:
        ValueError: An option has a wrong value, or two options contradict each other.

    Example:
        >>> def loss(weights, inputs):
        ...     return jnp.mean(jnp.square(inputs @ weights))
        >>> @jax.jit
        ... def step(weights, inputs, number):
        ...     key = jax.random.fold_in(jax.random.key(0), number)
        ...     gradient = optax.microbatching.microbatch(
        ...         jax.grad(loss), argnums=1, microbatch_size=4, accumulator=sketch_accumulator(key, 2)
        ...     )
        ...     return weights - 0.1 * gradient(weights, inputs)
        >>> step(jnp.ones((64, 64)), jnp.ones((8, 64)), 0).shape
        (64, 64)

    Source: Hao, Cao, Mou: "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024, algorithm 1;
    few bits, and projections that deal columns into buckets, are ours.
    """
    sketches = checked_sketches(ratio, rank, state_dtype, projection, matrix_axes)
    weight = 1.0 if num_microbatches is None else 1.0 / jnp.asarray(num_microbatches, jnp.float32)

    def init(value: Any) -> _Window:
        value = as_arrays(value)
        leaves, structure = jax.tree.flatten(value)
        shapes = _Shapes(structure, tuple(abstract_as(each, each.dtype) for each in leaves))
        return _Window(sketches.empty(value), shapes)

    def update(window: _Window, value: Any, index: ArrayLike) -> _Window:
        return window._replace(kept=sketches.add(window.kept, value, weight, key, index))

    def finalize(window: _Window) -> Any:
        like = window.shapes.tree()
        return optax.tree.cast_like(sketches.decode(window.kept, like, key), like)

    def aggregate(values: Any) -> Any:
        reduce = jnp.sum if num_microbatches is None else jnp.mean
        return jax.tree.map(lambda each: reduce(each, axis=0), values)

    return optax.microbatching.Accumulator(init, update, finalize, aggregate)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Shapes:
    """The gradients' shapes, dtypes and shardings, which the end of a loop needs and its carry cannot hold."""

    structure: Any
    leaves: tuple[Any, ...]

    def tree(self) -> Any:
        return self.structure.unflatten(self.leaves)


class _Window(NamedTuple):
    """What is carried from one micro-batch to the next."""

    kept: Any
    shapes: _Shapes
