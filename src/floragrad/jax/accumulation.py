"""Accumulator of ``optax.microbatching`` with sketches in place of a gradient tree."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from floragrad.jax.axes import MatrixAxesOrFn
from floragrad.jax.precision import as_arrays
from floragrad.jax.sharding import abstract_with_dtype
from floragrad.jax.sketch import make_tree_sketch
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
    """Sum or average gradients over micro-batches in a low-bit sketch.

    For the gradients g₁ … g_N of a window, with w = 1 or 1/N::

        C ← C + w · encode(gᵢ)          result = decode(C),   E[result] = w · Σ gᵢ

    C is rounded stochastically after each micro-batch. The default is int4 without a projection: an eighth of the
    gradients' bytes, plus a sixteenth for scales. Vectors, and arrays that quantization does not make smaller, are
    summed exactly in float32; vocabulary-like matrices are never projected.

    Projection and rounding are drawn from ``key``: with the same key in each window, errors repeat instead of averaging
    out over training. Build the accumulator inside the jitted step, with a key folded from the step number; no step
    recompiles.

    The interface of :class:`optax.microbatching.Accumulator` passes all N gradients through the sketch;
    :func:`compressed_multi_steps` does not compress the last one.

    ``optax.microbatching.micro_grad`` computes the gradient of each example and stacks those of a micro-batch.
    ``optax.microbatching.microbatch`` around ``jax.grad`` holds one gradient for each micro-batch.

    Args:
        key: A key of ``jax.random``, a new one for each window.
        num_microbatches: N for the mean, as ``AccumulationType.MEAN``; default None for the sum, as ``SUM``.
        ratio: ρ, the columns (inputs) that share one element of the sketch; default 1.
        rank: r, for a ratio of min(m, n) // r for each matrix; default None uses ``ratio``.
        state_dtype: ``"int4"`` (default), ``"int8"``, ``"bfloat16"`` or ``"float32"``.
        projection: ``"sign"`` (default) or the paper's ``"gaussian"``; no effect at ρ = 1.
        matrix_axes: Axes of inputs and outputs, as for :func:`floragrad.jax.scale_by_flora`.

    Raises:
        ValueError: An option has a wrong value, or two options contradict each other; or, at an update, gradients of
            another shape than at ``init``.

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
    quantization and bucket projections are additions.
    """
    tree_sketch = make_tree_sketch(ratio, rank, state_dtype, projection, matrix_axes)
    weight = 1.0 if num_microbatches is None else 1.0 / jnp.asarray(num_microbatches, jnp.float32)

    def init(value: Any) -> _Window:
        value = as_arrays(value)
        leaves, structure = jax.tree.flatten(value)
        shapes = _Shapes(structure, tuple(abstract_with_dtype(each, each.dtype) for each in leaves))
        return _Window(tree_sketch.init(value), shapes)

    def update(window: _Window, value: Any, index: ArrayLike) -> _Window:
        return window._replace(sketches=tree_sketch.add(window.sketches, value, weight, key, index))

    def finalize(window: _Window) -> Any:
        like = window.shapes.tree()
        return optax.tree.cast_like(tree_sketch.decode(window.sketches, like, key), like)

    def aggregate(values: Any) -> Any:
        reduce = jnp.sum if num_microbatches is None else jnp.mean
        return jax.tree.map(lambda each: reduce(each, axis=0), values)

    return optax.microbatching.Accumulator(init, update, finalize, aggregate)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Shapes:
    """Shapes, dtypes and shardings of the gradients, as static data in the carry of a loop."""

    structure: Any
    leaves: tuple[Any, ...]

    def tree(self) -> Any:
        return self.structure.unflatten(self.leaves)


class _Window(NamedTuple):
    """Carry from one micro-batch to the next."""

    sketches: Any
    shapes: _Shapes
