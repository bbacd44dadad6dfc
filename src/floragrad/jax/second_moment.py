"""Adafactor's second moment of the matrices whose momentum is sketched, with optax's state."""

from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from floragrad.jax.axes import Layout, MatrixAxesOrFn, layouts
from floragrad.jax.options import check_static
from floragrad.jax.sharding import replicate_merged_axes, reshard_like, shard_as_param
from floragrad.jax.state_checks import check_count, check_leaf_state
from floragrad.jax.trees import array_spec, unzip

BALANCE: Final = 2.0**36
"""Factor of 1 / sqrt(col), with its inverse in the factor of the rows: neither underflows nor overflows in float32."""


class Moments(NamedTuple):
    """Adafactor's second moment of one leaf; optax has arrays of one element in place of those that it does not need.

    Attributes:
        v_row: Mean of squares over the longer axis of each matrix.
        v_col: Mean of squares over the other axis.
        v: Squares, where the moment is not factored.
    """

    v_row: Any
    v_col: Any
    v: Any


class _LeafStep(NamedTuple):
    update: Array
    moments: Moments


def scale_by_factored_rms_of_matrices(
    factored: bool = True,
    decay_rate: float | Array = 0.8,
    min_dim_size_to_factor: int = 1,
    epsilon: float | Array = 1e-30,
    *,
    matrix_axes: MatrixAxesOrFn = None,
) -> optax.GradientTransformation:
    """Scale by :func:`optax.scale_by_factored_rms` of each matrix, whichever axes it has.

    optax factors the two longest axes of an array, which are not its matrix where a kernel has more than one axis of
    inputs or outputs, or where a stack has more matrices than one matrix has rows. Here the moment is factored for each
    matrix of a stack, and not factored for leaves without a matrix. The update, G times (row / mean(row))^(-1/2)
    col^(-1/2), is evaluated as sqrt(mean(row)) / sqrt(row) times G / sqrt(col), with a power of two moved between the
    factors: neither leaves the range of float32, so a row of zeros gives no NaN.

    Args:
        factored: False for a second moment that is not factored; default True.
        decay_rate: Exponent of the decay, 1 − t^(−decay_rate); default 0.8.
        min_dim_size_to_factor: Shortest side of matrices whose second moment is factored; default 1.
        epsilon: Added to squared gradients; default 1e-30.
        matrix_axes: Axes of inputs and outputs, as in :func:`floragrad.jax.scale_by_flora`.

    Returns:
        A transformation whose state is an ``optax.FactoredState``.

    Raises:
        ValueError: At an update, a state that does not fit the updates' shapes, or that was cast.

    Example:
        >>> scaling = scale_by_factored_rms_of_matrices()
        >>> state = scaling.init({"experts": jnp.zeros((64, 16, 32))})
        >>> state.v_row["experts"].shape, state.v_col["experts"].shape
        ((64, 16), (64, 32))

    Source: Shazeer, Stern, "Adafactor", ICML 2018, algorithm 4; bounds on the factors: ``docs/method.md``.
    """
    check_static(min_dim_size_to_factor=min_dim_size_to_factor)

    def init_leaf(layout: Layout, param: Any) -> Moments:
        shapes = moment_shapes(layout, factored, min_dim_size_to_factor)
        v_row, v_col, v = (jnp.zeros(shape, param.dtype) for shape in shapes)
        if shapes.v == layout.matrix_shape:
            v = layout.to_matrices(replicate_merged_axes(jnp.zeros_like(param), layout))
            return Moments(v_row, v_col, shard_as_param(v, param, layout, shard_inputs=True))
        longest, other = _mean_axes(layout)
        return Moments(
            shard_as_param(v_row, param, layout, shard_inputs=True, missing_axis=longest),
            shard_as_param(v_col, param, layout, shard_inputs=True, missing_axis=other),
            v,
        )

    def check_leaf(path: Any, layout: Layout, moments: Moments) -> None:
        expected = Moments(
            *(
                array_spec(shape, jnp.promote_types(found.dtype, jnp.float32))
                for shape, found in zip(moment_shapes(layout, factored, min_dim_size_to_factor), moments, strict=True)
            )
        )
        check_leaf_state(path, moments, expected)

    @partial(jax.jit, static_argnums=0)  # traced once for all equal leaves
    def step_leaf(layout: Layout, beta: Array, update: Array, moments: Moments) -> _LeafStep:
        v_row, v_col, v = moments
        grad = layout.to_matrices(replicate_merged_axes(update, layout))
        squares = jnp.square(grad) + epsilon
        if v.shape == grad.shape:
            v = beta * v + (1 - beta) * squares
            scaled, v = grad * lax.rsqrt(v), _clamp_to_finite(v)
        else:
            longest, other = _mean_axes(layout)
            v_row = beta * v_row + (1 - beta) * jnp.mean(squares, axis=longest)
            v_col = beta * v_col + (1 - beta) * jnp.mean(squares, axis=other)
            scaled = _precondition(grad, jnp.expand_dims(v_row, longest), jnp.expand_dims(v_col, other), other)
            v_row, v_col = _clamp_to_finite(v_row), _clamp_to_finite(v_col)
        moments = Moments(*(each.astype(grad.dtype) for each in (v_row, v_col, v)))
        return _LeafStep(reshard_like(layout.from_matrices(scaled.astype(grad.dtype)), update), moments)

    def init(params: Any) -> optax.FactoredState:
        leaves, structure = jax.tree.flatten(params)
        states = map(init_leaf, layouts(params, matrix_axes), leaves)
        return optax.FactoredState(jnp.zeros([], jnp.int32), *unzip(structure, states, 3))

    def update(updates: Any, state: optax.FactoredState, params: Any = None) -> tuple[Any, optax.FactoredState]:
        del params
        structure: Any
        paths, structure = jax.tree_util.tree_flatten_with_path(updates)
        moments = [Moments(*arrays) for arrays in zip(*map(structure.flatten_up_to, state[1:]), strict=True)]
        leaves = list(zip(layouts(updates, matrix_axes), paths, moments, strict=True))
        for layout, (path, _), leaf_moments in leaves:
            check_leaf(path, layout, leaf_moments)
        check_count(state.count)
        beta = 1.0 - (state.count.astype(jnp.float32) + 1) ** (-decay_rate)
        steps = [step_leaf(layout, beta, value, leaf_moments) for layout, (_, value), leaf_moments in leaves]
        new_moments = unzip(structure, (leaf_step.moments for leaf_step in steps), 3)
        scaled = structure.unflatten(leaf_step.update for leaf_step in steps)
        return scaled, optax.FactoredState(optax.safe_increment(state.count), *new_moments)

    return optax.GradientTransformation(init, update)


def moment_shapes(layout: Layout, factored: bool, min_dim_size_to_factor: int) -> Moments:
    """Return the shape of each array of the second moment.

    Args:
        layout: Matrices of the leaf.
        factored: False for a moment that is not factored.
        min_dim_size_to_factor: Shortest side of matrices whose moment is factored.
    """
    shape = layout.matrix_shape
    absent = (*(shape[:-2] if layout.view else ()), 1)
    if not layout.view or not factored or min(shape[-2:]) < min_dim_size_to_factor:
        return Moments(absent, absent, shape)
    row, col = list(shape), list(shape)
    longest, other = _mean_axes(layout)
    del row[longest], col[other]
    return Moments(tuple(row), tuple(col), absent)


def _mean_axes(layout: Layout) -> tuple[int, int]:
    """Return the axes of the means v_row and v_col: the longer one, of two equal ones the last, and the other."""
    *_, above, last = layout.matrix_shape
    return (-1, -2) if last >= above else (-2, -1)


def _precondition(grad: Array, row: Array, col: Array, along_rows: int) -> Array:
    """Return G times sqrt(mean(row)) / sqrt(row) and 1 / sqrt(col), both of them finite."""
    largest_mean = _finite_max(row) ** 0.75  # 2**96 in float32
    root = jnp.sqrt(jnp.minimum(jnp.mean(row, axis=along_rows, keepdims=True), largest_mean))
    return grad * (lax.rsqrt(col) * BALANCE) * (lax.rsqrt(_clamp_to_finite(row)) * (root / BALANCE))


def _clamp_to_finite(average: Array) -> Array:
    """Clamp an average with infinite squares to the largest finite value, so that it can decay; NaN stays NaN."""
    return jnp.minimum(average, _finite_max(average))


def _finite_max(array: Array) -> float:
    return float(jnp.finfo(array.dtype).max)  # type: ignore[no-untyped-call]
