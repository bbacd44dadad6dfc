"""``optax.MultiSteps`` with sketches for its accumulated gradients."""

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
from floragrad.jax.sketch import Sketches, checked_sketches
from floragrad.policy import Projection, StateDtype

ShouldSkipUpdate = Callable[[Any, ArrayLike, Any], tuple[ArrayLike, Any]]
"""As in :class:`optax.MultiSteps`: from updates, gradient step and parameters to whether to skip, and what to note."""


class CompressedMultiSteps(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """What :func:`compressed_multi_steps` returns: a gradient transformation with the methods of ``MultiSteps``."""

    def has_updated(self, state: optax.MultiStepsState) -> Array:
        """Whether the last micro-batch closed a window."""
        return jnp.logical_and(jnp.equal(state.mini_step, 0), jnp.greater(state.gradient_step, 0))

    def gradient_transformation(self) -> optax.GradientTransformation:
        """Itself."""
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
    """:class:`optax.MultiSteps` that keeps a sketch instead of accumulated gradients.

    Over a window of N = k micro-batches, with w = 1/N (1 where ``use_grad_mean`` is False)::

        i < N:   C ← C + w · encode(gᵢ), and updates of zeros
        i = N:   Ĝ = w · g_N + decode(C), updates of inner(Ĝ), and C ← 0;       E[Ĝ] = w · Σ gᵢ

    The last gradient is not compressed. C is rounded stochastically after every micro-batch; projection and
    rounding are drawn anew for every window, from ``seed`` and the state's ``gradient_step``, so that a run that is
    resumed, mid-window too, goes on as the uninterrupted one.

    It is a gradient transformation and can be used as one directly. The state is an ``optax.MultiStepsState`` whose
    ``acc_grads`` has a tree of payloads and a tree of scales. Differences from ``optax.MultiSteps``: the
    inner optimizer is not called on mini-steps (under ``vmap``, which turns branches into selections, it is); and
    ``acc_grads`` starts from zero in every window, so what is not finite does not outlive its own.

    Args:
        inner: Any gradient transformation; it is given Ĝ in the updates' dtypes.
        every_k_schedule: k, or a function from the gradient step to it.
        use_grad_mean: Average over the window, the default, or sum.
        should_skip_update_fn: Which micro-batches to leave out, for example :func:`optax.skip_not_finite` or
            :func:`optax.skip_large_updates` with its norm; default None leaves out none.
        ratio: ρ: how many columns (inputs) share one number of the sketch; default 1.
        rank: r, of which ρ is derived for each matrix, min(m, n) // r; default None goes by ``ratio``.
        state_dtype: ``"int4"`` (the default), ``"int8"``, ``"bfloat16"`` or ``"float32"``.
        projection: ``"sign"`` (the default) or the paper's ``"gaussian"``; without effect at ρ = 1.
        seed: Of projections and of rounding; default 0.
        matrix_axes: Which axes are inputs and outputs, as for :func:`floragrad.jax.scale_by_flora`.

    Raises:
        ValueError: An option has a wrong value, or two options contradict each other; or, at an update,
            ``should_skip_update_fn`` did not return a boolean scalar first.

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
    which compresses the last gradient too; few bits, and projections that deal columns into buckets, are ours.
    """
    sketches = checked_sketches(ratio, rank, state_dtype, projection, matrix_axes)
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
            acc_grads=sketches.empty(params),
            skip_state=skip_state,
        )

    def update(
        updates: Any, state: optax.MultiStepsState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.MultiStepsState]:
        updates = as_arrays(updates)
        k = every_k_schedule(state.gradient_step) if callable(every_k_schedule) else every_k_schedule
        weight = 1.0 / jnp.asarray(k, jnp.float32) if use_grad_mean else 1.0
        window = random.fold_in(random.key_of(seed), state.gradient_step)

        def finish(updates: Any, inner_state: Any, kept: Any) -> tuple[Any, Any, Any]:
            mean = _closed(sketches, kept, updates, weight, window)
            final, after = opt.update(mean, inner_state, params, **extra_args)
            return final, optax.tree.cast_like(after, inner_state), optax.tree.zeros_like(kept)

        def fold(updates: Any, inner_state: Any, kept: Any) -> tuple[Any, Any, Any]:
            zeros, *_ = keep(updates, inner_state, kept)
            return zeros, inner_state, sketches.add(kept, updates, weight, window, state.mini_step)

        def keep(updates: Any, inner_state: Any, kept: Any) -> tuple[Any, Any, Any]:
            shapes, *_ = jax.eval_shape(finish, updates, inner_state, kept)
            return optax.tree.zeros_like(shapes), inner_state, kept

        closes = jnp.greater_equal(state.mini_step + 1, k)
        operands = (updates, state.inner_opt_state, state.acc_grads)
        skips: Any = jnp.asarray(False)
        skip_state: Any = ()
        if should_skip_update_fn is None:
            final, inner_state, kept = lax.cond(closes, finish, fold, *operands)
        else:
            skips, skip_state = should_skip_update_fn(updates, state.gradient_step, params)
            _check_skips(skips)
            branch = jnp.where(skips, 2, closes.astype(jnp.int32))
            final, inner_state, kept = lax.switch(branch, (fold, finish, keep), *operands)
        counted = closes & ~skips
        return final, optax.MultiStepsState(
            mini_step=jnp.where(counted, 0, state.mini_step + (~skips).astype(jnp.int32)),
            gradient_step=jnp.where(counted, optax.safe_increment(state.gradient_step), state.gradient_step),
            inner_opt_state=inner_state,
            acc_grads=kept,
            skip_state=skip_state,
        )

    return CompressedMultiSteps(init, update)


def _closed(sketches: Sketches, kept: Any, updates: Any, weight: ArrayLike, window: Array) -> Any:
    """Ĝ: the last gradient as it is, the others as the sketch has them."""
    others = sketches.decode(kept, updates, window)

    def whole(last: Array, rest: Array) -> Array:
        wide = jnp.promote_types(last.dtype, jnp.float32)
        return (jnp.asarray(weight, wide) * last.astype(wide) + rest.astype(wide)).astype(last.dtype)

    return jax.tree.map(whole, updates, others)


def _check_skips(skips: Any) -> None:
    if jnp.shape(skips) != () or jnp.result_type(skips) != jnp.bool_:
        raise ValueError(
            f"should_skip_update_fn returned {jax.typeof(skips)} first: it must return a boolean scalar, "
            "and what to keep as skip_state"
        )
