"""Adafactor's second moment, by optax, on the matrices that momentum is sketched on."""

from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from floragrad.jax.axes import Layout, MatrixAxesOrFn, layouts
from floragrad.jax.options import check_static
from floragrad.jax.sharding import like, mergeable, place

BALANCE: Final = 2.0**36
"""Factor of 1 / sqrt(col) whose inverse is in the rows' factor: neither vanishes nor overflows in float32."""


class _Step(NamedTuple):
    update: Array
    v_row: Array
    v_col: Array
    v: Array


def scale_by_factored_rms_of_matrices(
    factored: bool = True,
    decay_rate: float | Array = 0.8,
    min_dim_size_to_factor: int = 1,
    epsilon: float | Array = 1e-30,
    *,
    matrix_axes: MatrixAxesOrFn = None,
) -> optax.GradientTransformation:
    """:func:`optax.scale_by_factored_rms` of each matrix by itself, whichever axes it has.

    optax factors the two longest axes of an array, which are not its matrix where a kernel has more than one axis
    of inputs or outputs, or where it is a stack of more matrices than one has rows. Here its state is made for each
    matrix as two axes, for stacks one matrix at a time, and for what holds no matrix unfactored. Its update, G times
    (row / mean(row))^(-1/2) col^(-1/2), is evaluated as sqrt(mean(row)) / sqrt(row) times G / sqrt(col), with a power
    of two moved between the factors: neither leaves float32, so a row of zeros is no NaN.

    Args:
        factored: False keeps the second moment whole.
        decay_rate: Exponent of its decay, 1 − t^(−decay_rate).
        min_dim_size_to_factor: Matrices with a shorter side than this keep it whole.
        epsilon: Added to squared gradients.
        matrix_axes: As in :func:`floragrad.jax.scale_by_flora`.

    Returns:
        A transformation whose state is an ``optax.FactoredState``.

    Example:
        >>> scaling = scale_by_factored_rms_of_matrices()
        >>> state = scaling.init({"experts": jnp.zeros((64, 16, 32))})
        >>> state.v_row["experts"].shape, state.v_col["experts"].shape
        ((64, 16), (64, 32))

    Source: Shazeer, Stern, "Adafactor", ICML 2018, algorithm 4; bounds on the factors: ``docs/method.md``.
    """
    check_static(min_dim_size_to_factor=min_dim_size_to_factor)
    of_matrix, of_vector = (
        optax.scale_by_factored_rms(factored=each, min_dim_size_to_factor=min_dim_size_to_factor)
        for each in (factored, False)
    )

    def of_leaves(tree: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(tree), layouts(tree, matrix_axes))

    def init_leaf(layout: Layout, param: Any) -> optax.FactoredState:
        zeros = layout.to_matrices(mergeable(jnp.zeros_like(param), layout))
        if layout.view is None:
            return of_vector.init(zeros)
        init = of_matrix.init
        for _ in layout.stack:
            init = jax.vmap(init)
        state = init(zeros)
        if state.v.shape == zeros.shape:
            return state._replace(v=place(state.v, param, layout, inputs=True))
        longest, other = _axes(layout)
        return state._replace(
            v_row=place(state.v_row, param, layout, inputs=True, without=longest),
            v_col=place(state.v_col, param, layout, inputs=True, without=other),
        )

    @partial(jax.jit, static_argnums=0)  # traced once for all equal leaves
    def step_leaf(layout: Layout, beta: Array, update: Array, v_row: Array, v_col: Array, v: Array) -> _Step:
        grad = layout.to_matrices(mergeable(update, layout))
        squares = jnp.square(grad) + epsilon
        if v.shape == grad.shape:
            v = beta * v + (1 - beta) * squares
            scaled, v = grad * lax.rsqrt(v), _saturated(v)
        else:
            longest, other = _axes(layout)
            v_row = beta * v_row + (1 - beta) * jnp.mean(squares, axis=longest)
            v_col = beta * v_col + (1 - beta) * jnp.mean(squares, axis=other)
            scaled = _scaled(grad, jnp.expand_dims(v_row, longest), jnp.expand_dims(v_col, other), other)
            v_row, v_col = _saturated(v_row), _saturated(v_col)
        moved = (each.astype(grad.dtype) for each in (v_row, v_col, v))
        return _Step(like(layout.from_matrices(scaled.astype(grad.dtype)), update), *moved)

    def init(params: Any) -> optax.FactoredState:
        each = of_leaves(params)
        states = jax.tree.map(init_leaf, each, params)
        v_row, v_col, v = (jax.tree.map(lambda _, s, at=at: s[at], each, states) for at in range(1, 4))
        return optax.FactoredState(jnp.zeros([], jnp.int32), v_row, v_col, v)

    def update(updates: Any, state: optax.FactoredState, params: Any = None) -> tuple[Any, optax.FactoredState]:
        del params
        each, (count, *kept) = of_leaves(updates), state
        beta = 1.0 - (count.astype(jnp.float32) + 1) ** (-decay_rate)
        steps = jax.tree.map(lambda layout, *its: step_leaf(layout, beta, *its), each, updates, *kept)
        scaled, *moved = (jax.tree.map(lambda _, s, at=at: s[at], each, steps) for at in range(4))
        return scaled, optax.FactoredState(optax.safe_increment(count), *moved)

    return optax.GradientTransformation(init, update)


def _axes(layout: Layout) -> tuple[int, int]:
    """The axes that v_row and v_col are means over: the longer one, of two like ones the last, and the other."""
    *_, above, last = layout.matrices
    return (-1, -2) if last >= above else (-2, -1)


def _scaled(grad: Array, row: Array, col: Array, along_rows: int) -> Array:
    """G times sqrt(mean(row)) / sqrt(row) and 1 / sqrt(col), each of which is finite."""
    largest_mean = _largest(row) ** 0.75  # 2**96 in float32
    root = jnp.sqrt(jnp.minimum(jnp.mean(row, axis=along_rows, keepdims=True), largest_mean))
    return grad * (lax.rsqrt(col) * BALANCE) * (lax.rsqrt(_saturated(row)) * (root / BALANCE))


def _saturated(average: Array) -> Array:
    """An average that is finite though a square was not, so that the next ones can pull it down; NaN stays NaN."""
    return jnp.minimum(average, _largest(average))


def _largest(array: Array) -> float:
    return float(jnp.finfo(array.dtype).max)  # type: ignore[no-untyped-call]
