"""The update of the momentum as a pure function of arrays, without storage, random draws or sharding."""

from jax import Array
from jax.typing import ArrayLike

from floragrad.jax.projection import Projection


def momentum_step(
    update: Array,
    momentum: Array,
    projection: Projection | None,
    previous: Projection | None,
    resampled: ArrayLike,
    b1: float | Array,
    *,
    residual: bool,
    axis: int = -2,
) -> tuple[Array, Array]:
    """Return D and the new M.

    With ``residual``, momentum inside the sketched subspace and the fresh update outside it::

        M ← β₁ transfer(M) + (1 − β₁) P U        D = U + Pᵀ (P Pᵀ)⁻¹ (M − P U)

    otherwise the paper's unbiased estimator, with M decoded by the projection that encoded it::

        D = (1 − β₁) U + β₁ P_oldᵀ M             M ← β₁ transfer(M) + (1 − β₁) P U

    Args:
        update: U, (..., n, m), float32.
        momentum: M, (..., k, m), float32.
        projection: P of this step; None at ρ = 1, where both estimators are plain momentum.
        previous: P of the step before.
        resampled: True where the two differ; may be traced.
        b1: β₁.
        residual: Estimator.
        axis: Axis of the inputs, n and k; default -2; -1 for arrays of (..., m, n).
    """
    if projection is None or previous is None:
        momentum = b1 * momentum + (1 - b1) * update
        return momentum, momentum
    transferred = projection.transfer(momentum, previous, resampled, orthogonal=residual, axis=axis)
    sketch = projection.encode(update, axis=axis)
    new_momentum = b1 * transferred + (1 - b1) * sketch
    if residual:
        return update + projection.decode_orthogonal(new_momentum - sketch, axis=axis), new_momentum
    return (1 - b1) * update + b1 * previous.decode(momentum, axis=axis), new_momentum
