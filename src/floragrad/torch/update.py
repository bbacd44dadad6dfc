"""The update as pure functions of tensors: what is computed, not when, nor how its state is stored.

Each function takes any number of rows of a matrix view, (..., rows, n), so a tensor can be put through in
blocks of rows. All maths is float32 (float64 parameters keep their own precision when they are written).
Formulas: design of Flora (Hao, Cao, Mou, ICML 2024) on Adafactor (Shazeer, Stern, ICML 2018); deviations are
listed in ``docs/method.md``.
"""

from typing import NamedTuple

from torch import Tensor, linalg, promote_types
from torch import float32 as _float32
from torch import float64 as _float64

from floragrad.torch.projection import BucketProjection, Projection


def square_sums(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of G² along the rows, (..., rows, 1), and along the columns, (..., 1, n)."""
    squares = grad.float().square()
    return squares.sum(-1, keepdim=True), squares.sum(-2, keepdim=True)


def moving_average(average: Tensor, value: Tensor, beta: Tensor) -> Tensor:
    """β·average + (1 − β)·value."""
    return average * beta + value * (1 - beta)


def factors(row_var: Tensor, row_mean: Tensor, col_var: Tensor) -> tuple[Tensor, Tensor]:
    """What G is multiplied by for U: rsqrt(row / mean(row)), (..., m, 1), and rsqrt(col), (..., 1, n)."""
    return (row_var / row_mean).rsqrt(), col_var.rsqrt()


def normalise(grad: Tensor, scales: tuple[Tensor, ...]) -> Tensor:
    """U: the gradient times every scale, in float32."""
    # bfloat16 and float16 gradients are promoted by the float32 scales, in the same pass.
    update = (grad.float() if grad.dtype == _float64 else grad) * scales[0]
    for scale in scales[1:]:
        update.mul_(scale)
    return update


class Estimator(NamedTuple):
    """How the momentum of some rows moves, and what is decoded of it.

    Attributes:
        projection: P of this step; None at ρ = 1, where both estimators are plain momentum.
        previous: P of the step before where this step opens a new epoch, else None.
        beta1: β₁.
        residual: Which estimator.
    """

    projection: Projection | None
    previous: Projection | None
    beta1: float
    residual: bool

    def following(self, sketch: Tensor, momentum: Tensor) -> Tensor:
        """The next M, of encode(U) and M."""
        carried = momentum
        if self.projection is not None and self.previous is not None:
            carried = self.projection.transfer(momentum, self.previous, orthogonal=self.residual)
        return sketch.lerp(carried, self.beta1)


def momentum_step(
    update: Tensor, momentum: Tensor, by: Estimator, sketch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """D and the next M; U's memory may be taken for D.

    With ``residual``, momentum inside the sketched subspace and the fresh gradient outside it::

        M ← β₁ transfer(M) + (1 − β₁) encode(U)        D = U + (M − encode(U)) (P Pᵀ)⁻¹ P

    otherwise the paper's unbiased estimator, M read in the basis that it was written in::

        D = (1 − β₁) U + β₁ decode_old(M)              M ← β₁ transfer(M) + (1 − β₁) encode(U)

    Args:
        update: U, (..., rows, n).
        momentum: M, (..., rows, k).
        by: The projections, β₁, and which estimator.
        sketch: encode(U), where it is known already, as it must be if columns are elsewhere.
    """
    projection = by.projection
    if projection is None:
        momentum = by.following(update, momentum)
        return momentum, momentum
    sketch = projection.encode(update) if sketch is None else sketch
    following = by.following(sketch, momentum)
    if by.residual:
        return projection.add_orthogonal_(update, following - sketch), following
    reading = projection if by.previous is None else by.previous
    return reading.decode(momentum).mul_(by.beta1).add_(update, alpha=1 - by.beta1), following


def direction_square(update: Tensor, momentum: Tensor, by: Estimator, sketch: Tensor | None = None) -> Tensor:
    """‖D‖² of :func:`momentum_step`; U's memory may be overwritten.

    With signs or learnt weights D is U with its part inside the sketched subspace exchanged, so that D itself is
    not needed::

        ‖D‖² = ‖U‖² + Σ (M² − encode(U)²) / diag(P Pᵀ)       M the next momentum
    """
    if sketch is None and by.residual and isinstance(by.projection, BucketProjection):
        sketch = by.projection.encode(update)
        following = by.following(sketch, momentum)
        exchanged = (following + sketch).mul_(following - sketch).div_(by.projection.gram).sum()
        return square_norm(update) + exchanged
    return square_norm(momentum_step(update, momentum, by, sketch)[0])


def square_norm(values: Tensor) -> Tensor:
    """The sum of squares, without a tensor of squares."""
    norm: Tensor = linalg.vector_norm(values)
    return norm.square()


def descend(param: Tensor, direction: Tensor, keep: Tensor, size: Tensor) -> Tensor:
    """keep·W − size·D, in float32 (or the parameter's precision where that is higher)."""
    exact = param.to(promote_types(param.dtype, _float32)) * keep
    return exact.addcmul_(direction.to(exact.dtype), size.to(exact.dtype), value=-1)
