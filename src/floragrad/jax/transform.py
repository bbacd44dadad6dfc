"""Momentum of Flora as one pure gradient transformation."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from floragrad._checks import DEFAULT_RANK, refuse_renamed
from floragrad.jax.axes import MatrixAxesOrFn
from floragrad.jax.draws import RandomPool, draw_pools
from floragrad.jax.leaf import Leaf, LeafState, init_leaf_state
from floragrad.jax.leaf_step import LeafStep, step_leaf
from floragrad.jax.options import resolve_options
from floragrad.jax.precision import as_arrays
from floragrad.jax.state_checks import check_count, check_leaf_state
from floragrad.jax.trees import unzip
from floragrad.policy import EmbeddingMomentum, StateDtype
from floragrad.policy import Projection as ProjectionKind


class ScaleByFloraState(NamedTuple):
    """State of :func:`scale_by_flora`.

    Attributes:
        count: Number of steps, int32.
        mu: Payload of each leaf's momentum, a sketch or uncompressed, in ``mu_dtype``; an :class:`optax.MaskedNode` for
            leaves without momentum.
        mu_scale: Scales of ``"int8"`` and ``"int4"``, one for each block of 64 along the inputs, float32; an
            ``optax.MaskedNode`` elsewhere.
        projection_weight: Weights of ``"adaptive"``, (..., n), float32; an ``optax.MaskedNode`` elsewhere.
        projection_id: Seed, leaf index and resample index of the projection that the sketch is encoded with, (3,),
            uint32. The leaf index is the position at ``init``, never changes, and numbers the random bits of rounding
            too. An ``optax.MaskedNode`` for leaves that draw nothing at random.
    """

    count: Array  # type: ignore[assignment]  # optax's name, and a method of tuple
    mu: Any
    mu_scale: Any
    projection_weight: Any
    projection_id: Any = None


@refuse_renamed(tau="rank", beta="b1")
def scale_by_flora(
    rank: int | None = DEFAULT_RANK,
    b1: float | Array | None = 0.9,
    kappa: int | Array = 1000,
    projection: ProjectionKind = "sign",
    residual: bool | None = None,
    seed: int | Array = 0,
    embedding_momentum: EmbeddingMomentum = "none",
    mu_dtype: StateDtype | DTypeLike = "int8",
    *,
    ratio: int | None = None,
    matrix_axes: MatrixAxesOrFn = None,
) -> optax.GradientTransformation:
    """Replace updates by their momentum, stored as a random projection that is resampled every ``kappa`` steps.

    For a kernel's update U (n x m: in, out) and P (k x n), drawn from ``seed``::

        M ← b1·transfer(M) + (1 − b1) P U        D = U + Pᵀ (P Pᵀ)⁻¹ (M − P U)

    M is k x m with k ≈ n·rank / min(m, n): the only large state. ``residual=False`` is the paper's estimator,
    D = (1 − b1) U + b1 Pᵀ M with M and P of the step before. Arrays without a matrix have an uncompressed momentum in
    float32; matrices of an embedding's shape (longer side above 8,192 and at least 8 times the shorter one) have no
    momentum by default. Arithmetic is float32; updates keep their dtype.

    Args:
        rank: r of the paper; ρ = min(m, n) // r inputs share one element of the momentum; default 128.
        b1: Decay of the momentum; default 0.9; None or 0 for no momentum and no buffers.
        kappa: Steps between two projections; default 1000; 100 suits ``"adaptive"``.
        projection: ``"sign"`` (default), ``"adaptive"`` (adapted weights, n float32 elements more), ``"gaussian"`` (the
            paper's).
        residual: True for momentum inside the sketched subspace and the fresh update outside it, as above; False for
            the paper's unbiased estimator; default None, True but for ``"gaussian"``, which has no residual.
        seed: Seed of projections and rounding, 0 to 2**32 - 1; default 0.
        embedding_momentum: Momentum of embedding-like arrays: ``"none"`` (default), ``"full"``, ``"compressed"``.
        mu_dtype: Storage format of the momentum: ``"float32"``, ``"bfloat16"``, ``"int8"`` (default) or ``"int4"`` (or
            such a dtype), the last three with stochastic rounding, so that the average stays unbiased.
        ratio: ρ, the same for all arrays, instead of ``rank``; default None.
        matrix_axes: Axes of inputs and outputs: a :class:`~floragrad.jax.MatrixAxes`, a tree of them or a function from
            the parameters to one; default None, the last two axes of each array, in this order.

    Returns:
        A transformation whose state is a :class:`ScaleByFloraState`.

    Raises:
        ValueError: An option has a wrong value, or options contradict each other; or, at an update, a state that does
            not fit the updates' shapes and the options, or that was cast.

    Example:
        >>> momentum = scale_by_flora(rank=4)
        >>> state = momentum.init({"kernel": jnp.zeros((16, 32)), "bias": jnp.zeros(32)})
        >>> state.mu["kernel"].shape, state.mu["bias"].shape
        ((4, 32), (32,))

    Source: Hao, Cao, Mou, "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024, algorithm 2.
    Deviations from it: ``docs/method.md``.
    """
    options = resolve_options(
        rank=rank,
        ratio=ratio,
        b1=b1,
        kappa=kappa,
        projection=projection,
        residual=residual,
        seed=seed,
        embedding_momentum=embedding_momentum,
        mu_dtype=mu_dtype,
        matrix_axes=matrix_axes,
    )

    def leaves(tree: Any) -> list[Leaf]:
        return [Leaf(options, *each, index) for index, each in enumerate(options.plans(tree))]

    @partial(jax.jit, static_argnums=0)
    def step(leaf: Leaf, count: Array, update: Array, state: LeafState, pool: RandomPool | None) -> LeafStep:
        """Trace a step once for all equal leaves."""
        return step_leaf(leaf, count, update, state, pool)

    def init(params: Any) -> ScaleByFloraState:
        params = as_arrays(params)
        values, structure = jax.tree.flatten(params)
        states = [init_leaf_state(leaf, value) for leaf, value in zip(leaves(params), values, strict=True)]
        return ScaleByFloraState(jnp.zeros([], jnp.int32), *unzip(structure, states, 4))

    def update(updates: Any, state: ScaleByFloraState, params: Any = None) -> tuple[Any, ScaleByFloraState]:
        del params
        if state.projection_id is None:
            raise ValueError(
                "this state comes from a version of floragrad without projection_id: "
                "floragrad.jax.upgrade_state(state, optimizer.init(params)) adds it"
            )
        updates = as_arrays(updates)
        structure: Any
        paths, structure = jax.tree_util.tree_flatten_with_path(updates)
        parts = zip(*map(structure.flatten_up_to, state[1:]), strict=True)
        states, each = [LeafState(*fields) for fields in parts], leaves(updates)
        for (path, _), leaf, leaf_state in zip(paths, each, states, strict=True):
            check_leaf_state(path, leaf_state, leaf.specs)
        check_count(state.count)
        count = optax.safe_increment(state.count)
        pools = draw_pools(each, [leaf_state.projection_id for leaf_state in states], options, count)
        steps = [
            step(leaf, count, value, leaf_state, pool)
            for leaf, (_, value), leaf_state, pool in zip(each, paths, states, pools, strict=True)
        ]
        direction = structure.unflatten(leaf_step.direction for leaf_step in steps)
        return direction, ScaleByFloraState(count, *unzip(structure, (leaf_step.state for leaf_step in steps), 4))

    return optax.GradientTransformation(init, update)
