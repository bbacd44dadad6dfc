"""The momentum as one pure gradient transformation."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from floragrad._checks import DEFAULT_RANK
from floragrad.jax.axes import MatrixAxesOrFn
from floragrad.jax.draws import Pool, draw_pools
from floragrad.jax.leaf import Kept, Leaf, initial
from floragrad.jax.leaf_step import Step, step_leaf
from floragrad.jax.options import resolve
from floragrad.jax.precision import as_arrays
from floragrad.policy import EmbeddingMomentum, StateDtype
from floragrad.policy import Projection as ProjectionKind


class ScaleByFloraState(NamedTuple):
    """State of :func:`scale_by_flora`.

    Attributes:
        count: Steps taken, int32.
        mu: For each leaf the numbers of its momentum, a sketch or whole; an :class:`optax.MaskedNode` where there
            is none.
        mu_scale: In ``"int8"`` and ``"int4"`` their scales, one for each block of 64 along the inputs; an
            ``optax.MaskedNode`` elsewhere.
        projection_weight: The learnt weights of ``"adaptive"``, (..., n) in float32; an ``optax.MaskedNode``
            elsewhere.
        projection_id: For each leaf that draws at random, uint32 of (3,): seed, index and epoch of the projection
            that its sketch is written in. The index is the leaf's position at ``init``, and stays with it; it numbers
            the rounding too. An ``optax.MaskedNode`` elsewhere.
    """

    count: Array  # type: ignore[assignment]  # optax's name for it, which a tuple has too
    mu: Any
    mu_scale: Any
    projection_weight: Any
    projection_id: Any = None


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
    """Replace updates by their momentum, kept as a random projection that is redrawn every ``kappa`` steps.

    For a kernel's update U (n x m: in, out) and P (k x n), drawn from ``seed``::

        M ← b1·transfer(M) + (1 − b1) P U        D = U + Pᵀ (P Pᵀ)⁻¹ (M − P U)

    M is k x m with k ≈ n·rank / min(m, n): the only large state. With ``residual=False``, the paper's
    estimator, D = (1 − b1) U + b1 Pᵀ M with M and P as they were before this step. Arrays that hold no matrix
    keep their momentum whole, in float32; matrices of an embedding's shape (above 8,192 long and at least 8 times as
    long as wide) keep none unless asked to.
    Maths is float32; updates are returned in the dtype that they come in.

    Args:
        rank: r of the paper; ρ = min(m, n) // r inputs share one number of the momentum.
        b1: Decay of the momentum; None or 0 keeps none and allocates nothing.
        kappa: Steps between two projections. ``"adaptive"`` wants a smaller one: 100.
        projection: ``"sign"``, ``"adaptive"`` (learnt weights, n floats more), ``"gaussian"`` (the paper's).
        residual: Momentum inside the sketched subspace and the fresh update outside it, as above; False is the
            paper's unbiased estimator. None: True but for ``"gaussian"``, which has no residual.
        seed: Of projections and of rounding, 0 to 2**32 - 1. The same seed gives the same numbers.
        embedding_momentum: What embedding-like arrays keep: ``"none"``, ``"full"``, ``"compressed"``.
        mu_dtype: Storage of the momentum: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"`` (or such a
            dtype), the last three rounded stochastically, so that the average stays unbiased.
        ratio: ρ itself, the same for every array; instead of ``rank``.
        matrix_axes: Which axes are inputs and outputs: a :class:`~floragrad.jax.MatrixAxes`, a tree of them or
            a function from the parameters to one. None: the last two axes of each array, in this order.

    Returns:
        A transformation whose state is a :class:`ScaleByFloraState`.

    Raises:
        ValueError: An option has a wrong value, or options contradict each other.

    Example:
        >>> momentum = scale_by_flora(rank=4)
        >>> state = momentum.init({"kernel": jnp.zeros((16, 32)), "bias": jnp.zeros(32)})
        >>> state.mu["kernel"].shape, state.mu["bias"].shape
        ((4, 32), (32,))

    Source: Hao, Cao, Mou, "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024, algorithm 2.
    Deviations from it: ``docs/method.md``.
    """
    options = resolve(
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
    def step(leaf: Leaf, count: Array, update: Array, kept: Kept, pool: Pool | None) -> Step:
        """Traced once for all equal leaves."""
        return step_leaf(leaf, count, update, kept, pool)

    def init(params: Any) -> ScaleByFloraState:
        params = as_arrays(params)
        values, structure = jax.tree.flatten(params)
        kept = [initial(leaf, value) for leaf, value in zip(leaves(params), values, strict=True)]
        return _state(jnp.zeros([], jnp.int32), structure, kept)

    def update(updates: Any, state: ScaleByFloraState, params: Any = None) -> tuple[Any, ScaleByFloraState]:
        del params
        if state.projection_id is None:
            raise ValueError(
                "this state comes from a floragrad that did not keep projection_id: "
                "floragrad.jax.upgrade_state(state, optimizer.init(params)) adds it"
            )
        updates = as_arrays(updates)
        structure: Any = jax.tree.structure(updates)
        each, count = leaves(updates), optax.safe_increment(state.count)
        kept = [Kept(*parts) for parts in zip(*map(structure.flatten_up_to, state[1:]), strict=True)]
        pools = draw_pools(each, [its.projection_id for its in kept], options, count)
        every = zip(each, jax.tree.leaves(updates), kept, pools, strict=True)
        steps = [step(leaf, count, value, its, pool) for leaf, value, its, pool in every]
        return structure.unflatten(step.direction for step in steps), _state(
            count, structure, [step.kept for step in steps]
        )

    return optax.GradientTransformation(init, update)


def _state(count: Array, structure: Any, kept: list[Kept]) -> ScaleByFloraState:
    # A tree without leaves, as optax.tree.map_params gives, has every field too.
    fields = zip(*kept, strict=True) if kept else [()] * len(Kept._fields)
    return ScaleByFloraState(count, *(structure.unflatten(parts) for parts in fields))
