"""Adafactor's second moment, by optax, on the matrices that momentum is sketched on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from floragrad.jax.axes import Layout, MatrixAxesOrFn, layouts
from floragrad.jax.options import check_static
from floragrad.jax.sharding import like, mergeable, place


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
    of inputs or outputs, or where it is a stack of more matrices than one has rows. Here its transformation is
    given each matrix as two axes, stacks one matrix at a time, and what holds no matrix unfactored. Nothing is
    computed anew.

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

    Source: Shazeer, Stern, "Adafactor", ICML 2018, algorithm 4.
    """
    check_static(min_dim_size_to_factor=min_dim_size_to_factor)
    shared = {"decay_rate": decay_rate, "min_dim_size_to_factor": min_dim_size_to_factor, "epsilon": epsilon}
    of_matrix, of_vector = (optax.scale_by_factored_rms(factored=each, **shared) for each in (factored, False))

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
        # The longest axis, the last of two like ones, is what optax averages over for v_row.
        *_, above, last = layout.matrices
        longest, other = (-1, -2) if last >= above else (-2, -1)
        return state._replace(
            v_row=place(state.v_row, param, layout, inputs=True, without=longest),
            v_col=place(state.v_col, param, layout, inputs=True, without=other),
        )

    def step_leaf(layout: Layout, count: Array, update: Array, *kept: Array) -> _Step:
        inner = of_vector if layout.view is None else of_matrix

        def step(matrix: Array, *kept: Array) -> _Step:
            # Of the parameters optax reads the shape and the dtype, which are the update's.
            scaled, state = inner.update(matrix, optax.FactoredState(count, *kept), matrix)
            return _Step(scaled, state.v_row, state.v_col, state.v)

        for _ in layout.stack if layout.view else ():
            step = jax.vmap(step)
        scaled, *moved = step(layout.to_matrices(mergeable(update, layout)), *kept)
        return _Step(like(layout.from_matrices(scaled), update), *moved)

    def init(params: Any) -> optax.FactoredState:
        each = of_leaves(params)
        states = jax.tree.map(init_leaf, each, params)
        v_row, v_col, v = (jax.tree.map(lambda _, s, at=at: s[at], each, states) for at in range(1, 4))
        return optax.FactoredState(jnp.zeros([], jnp.int32), v_row, v_col, v)

    def update(updates: Any, state: optax.FactoredState, params: Any = None) -> tuple[Any, optax.FactoredState]:
        del params
        each, (count, *kept) = of_leaves(updates), state
        steps = jax.tree.map(lambda layout, *its: step_leaf(layout, count, *its), each, updates, *kept)
        scaled, *moved = (jax.tree.map(lambda _, s, at=at: s[at], each, steps) for at in range(4))
        return scaled, optax.FactoredState(optax.safe_increment(count), *moved)

    return optax.GradientTransformation(init, update)
