"""Gradient accumulation like ``optax.MultiSteps``, in sketches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from floragrad._checks import check_value
from floragrad.jax import random
from floragrad.jax.axes import MatrixAxesOrFn
from floragrad.jax.options import COUNT_CHECK, SEED_CHECK
from floragrad.jax.precision import as_arrays
from floragrad.jax.sketch import TreeSketch, make_tree_sketch
from floragrad.policy import Projection, StateDtype

ShouldSkipUpdate = Callable[[Any, ArrayLike, Any], tuple[ArrayLike, Any]]
"""Function of updates, gradient step and parameters to a boolean scalar and ``skip_state``, as in optax.MultiSteps."""


class CompressedMultiSteps(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """Gradient transformation of :func:`compressed_multi_steps`, with the methods of ``optax.MultiSteps``."""

    def has_updated(self, state: optax.MultiStepsState) -> Array:
        """Return True where the last micro-batch ended a window."""
        return jnp.logical_and(jnp.equal(state.mini_step, 0), jnp.greater(state.gradient_step, 0))

    def gradient_transformation(self) -> optax.GradientTransformation:
        """Return the transformation itself."""
        return self


def compressed_multi_steps(
    inner: optax.GradientTransformation,
    every_k_schedule: int | Callable[[ArrayLike], ArrayLike],
    use_grad_mean: bool = True,
    should_skip_update_fn: ShouldSkipUpdate | None = None,
    *,
    ratio: int = 1,
    rank: int | None = None,
    state_dtype: StateDtype | DTypeLike = "int4",
    projection: Projection = "sign",
    seed: int = 0,
    matrix_axes: MatrixAxesOrFn = None,
) -> CompressedMultiSteps:
    """Accumulate gradients over micro-batches in a sketch, with the interface of :class:`optax.MultiSteps`.

    Over a window of N = k micro-batches, with w = 1/N (1 where ``use_grad_mean`` is False)::

        i < N:   C ← C + w · encode(gᵢ), and updates of zeros
        i = N:   Ĝ = w · g_N + decode(C), updates of inner(Ĝ), and C ← 0;       E[Ĝ] = w · Σ gᵢ

    The last gradient is not compressed. C is rounded stochastically after each micro-batch; projection and rounding
    depend on ``seed`` and the state's ``gradient_step``, so a resumed run, inside a window too, equals the
    uninterrupted one.

    The state is an ``optax.MultiStepsState`` whose ``acc_grads`` has a tree of payloads and a tree of scales.
    Differences from ``optax.MultiSteps``: the inner optimizer is not called on mini-steps (under ``vmap``, which turns
    branches into selections, it is); and ``acc_grads`` starts from zero in each window, so that a gradient that is not
    finite affects no other window.

    Args:
        inner: Any gradient transformation; receives Ĝ in the updates' dtypes.
        every_k_schedule: k, or a function from the gradient step to k.
        use_grad_mean: True (default) for the mean over the window, False for the sum.
        should_skip_update_fn: Function that selects micro-batches to skip, for example :func:`optax.skip_not_finite` or
            :func:`optax.skip_large_updates` with its norm; default None skips none.
        ratio: ρ, the columns (inputs) that share one element of the sketch; default 1.
        rank: r, for a ratio of min(m, n) // r for each matrix; default None uses ``ratio``.
        state_dtype: ``"int4"`` (default), ``"int8"``, ``"bfloat16"`` or ``"float32"``.
        projection: ``"sign"`` (default) or the paper's ``"gaussian"``; no effect at ρ = 1.
        seed: Seed of projections and rounding, 0 to 2**32 - 1; default 0.
        matrix_axes: Axes of inputs and outputs, as for :func:`floragrad.jax.scale_by_flora`.

    Raises:
        ValueError: An option has a wrong value, or two options contradict each other; or, at an update,
            ``should_skip_update_fn`` returns no boolean scalar, or sketches do not fit the updates' shapes and the
            options, or were cast.

    Example:
        >>> optimizer = compressed_multi_steps(optax.adamw(1e-3), every_k_schedule=2)
        >>> params = {"kernel": jnp.ones((64, 64))}
        >>> state, update = optimizer.init(params), jax.jit(optimizer.update)
        >>> for _ in range(2):
        ...     updates, state = update(params, state, params)
        ...     print(bool(optimizer.has_updated(state)), bool(updates["kernel"].any()))
        False False
        True True

    Source: Hao, Cao, Mou: "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024, algorithm 1,
    which compresses the last gradient too; quantization and bucket projections are additions.
    """
    tree_sketch = make_tree_sketch(ratio, rank, state_dtype, projection, matrix_axes)
    if not callable(every_k_schedule):
        allowed = "an integer >= 1, or a function from the gradient step; below 2**31"
        check_value("every_k_schedule", every_k_schedule, (COUNT_CHECK[0], allowed))
    check_value("seed", seed, SEED_CHECK)
    opt = optax.with_extra_args_support(inner)

    def init(params: Any) -> optax.MultiStepsState:
        params, gradient_step = as_arrays(params), jnp.zeros([], jnp.int32)
        skip_state: Any = ()
        if should_skip_update_fn is not None:
            _, skip_state = should_skip_update_fn(optax.tree.zeros_like(params), gradient_step, params)
        return optax.MultiStepsState(
            mini_step=jnp.zeros([], jnp.int32),
            gradient_step=gradient_step,
            inner_opt_state=opt.init(params),
            acc_grads=tree_sketch.init(params),
            skip_state=skip_state,
        )

    def update(
        updates: Any, state: optax.MultiStepsState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.MultiStepsState]:
        updates = as_arrays(updates)
        k = every_k_schedule(state.gradient_step) if callable(every_k_schedule) else every_k_schedule
        weight = 1.0 / jnp.asarray(k, jnp.float32) if use_grad_mean else 1.0
        window = random.fold_in(random.key_from_seed(seed), state.gradient_step)

        def finish(updates: Any, inner_state: Any, sketches: Any) -> tuple[Any, Any, Any]:
            grads = _window_gradient(tree_sketch, sketches, updates, weight, window)
            final, after = opt.update(grads, inner_state, params, **extra_args)
            return final, optax.tree.cast_like(after, inner_state), optax.tree.zeros_like(sketches)

        def accumulate(updates: Any, inner_state: Any, sketches: Any) -> tuple[Any, Any, Any]:
            zeros, *_ = skip(updates, inner_state, sketches)
            return zeros, inner_state, tree_sketch.add(sketches, updates, weight, window, state.mini_step)

        def skip(updates: Any, inner_state: Any, sketches: Any) -> tuple[Any, Any, Any]:
            shapes, *_ = jax.eval_shape(finish, updates, inner_state, sketches)
            return optax.tree.zeros_like(shapes), inner_state, sketches

        is_last = jnp.greater_equal(state.mini_step + 1, k)
        operands = (updates, state.inner_opt_state, state.acc_grads)
        should_skip: Any = jnp.asarray(False)
        skip_state: Any = ()
        if should_skip_update_fn is None:
            final, inner_state, sketches = lax.cond(is_last, finish, accumulate, *operands)
        else:
            should_skip, skip_state = should_skip_update_fn(updates, state.gradient_step, params)
            _check_should_skip(should_skip)
            branch = jnp.where(should_skip, 2, is_last.astype(jnp.int32))
            final, inner_state, sketches = lax.switch(branch, (accumulate, finish, skip), *operands)
        ends = is_last & ~should_skip
        return final, optax.MultiStepsState(
            mini_step=jnp.where(ends, 0, state.mini_step + (~should_skip).astype(jnp.int32)),
            gradient_step=jnp.where(ends, optax.safe_increment(state.gradient_step), state.gradient_step),
            inner_opt_state=inner_state,
            acc_grads=sketches,
            skip_state=skip_state,
        )

    return CompressedMultiSteps(init, update)


def _window_gradient(tree_sketch: TreeSketch, sketches: Any, updates: Any, weight: ArrayLike, window: Array) -> Any:
    """Return Ĝ: the last gradient plus the decoded sketch of the others."""
    others = tree_sketch.decode(sketches, updates, window)

    def add(last: Array, rest: Array) -> Array:
        dtype = jnp.promote_types(last.dtype, jnp.float32)
        return (jnp.asarray(weight, dtype) * last.astype(dtype) + rest.astype(dtype)).astype(last.dtype)

    return jax.tree.map(add, updates, others)


def _check_should_skip(should_skip: Any) -> None:
    if jnp.shape(should_skip) != () or jnp.result_type(should_skip) != jnp.bool_:
        raise ValueError(
            f"should_skip_update_fn returned {jax.typeof(should_skip)} first: it must return a boolean scalar, "
            "and what to keep as skip_state"
        )
