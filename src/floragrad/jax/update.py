"""The update of the momentum as a pure function of arrays: what is computed, not when, nor how M is stored."""

from jax import Array
from jax.typing import ArrayLike

from floragrad.jax.projection import Projection


def momentum_step(
    update: Array,
    momentum: Array,
    projection: Projection | None,
    previous: Projection | None,
    changed: ArrayLike,
    b1: float | Array,
    *,
    residual: bool,
    axis: int = -2,
) -> tuple[Array, Array]:
    """D and the next M.

    With ``residual``, momentum inside the sketched subspace and the fresh update outside it::

        M ← β₁ transfer(M) + (1 − β₁) P U        D = U + Pᵀ (P Pᵀ)⁻¹ (M − P U)

    otherwise the paper's unbiased estimator, M read in the basis that it was written in::

        D = (1 − β₁) U + β₁ P_oldᵀ M             M ← β₁ transfer(M) + (1 − β₁) P U

    Args:
        update: U, (..., n, m), float32.
        momentum: M, (..., k, m), float32.
        projection: P of this step; None at ρ = 1, where both estimators are plain momentum.
        previous: P of the step before.
        changed: Whether the two differ: whether this step opens a new epoch.
        b1: β₁.
        residual: Which estimator.
        axis: Of the inputs, n and k; -1 for arrays of (..., m, n).
    """
    if projection is None or previous is None:
        momentum = b1 * momentum + (1 - b1) * update
        return momentum, momentum
    carried = projection.carry(momentum, previous, changed, orthogonal=residual, axis=axis)
    sketch = projection.encode(update, axis=axis)
    following = b1 * carried + (1 - b1) * sketch
    if residual:
        return update + projection.decode_orthogonal(following - sketch, axis=axis), following
    return (1 - b1) * update + b1 * previous.decode(momentum, axis=axis), following
