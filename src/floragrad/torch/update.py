"""The update as pure functions of tensors, independent of storage and order.

Each function takes any number of rows of a matrix view, (..., rows, n), so a tensor can be put through in
blocks of rows. All maths is float32 (float64 parameters keep their own precision when they are written).
Formulas: design of Flora (Hao, Cao, Mou, ICML 2024) on Adafactor (Shazeer, Stern, ICML 2018); deviations are
listed in ``docs/method.md``.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor, linalg, promote_types

from floragrad.torch.projection import BucketProjection, Projection
from floragrad.torch.storage import round_to_bfloat16

BALANCE: Final = 2.0**36
"""Factor of C, and its inverse of R, so that V² = (G · C)² neither underflows in small rows nor overflows."""
LARGEST_MEAN: Final = 2.0**96
"""Bound on the mean of the rows' averages, so that U² stays finite: a root mean square of 2.8e14."""
LARGEST_FLOAT: Final = torch.finfo(torch.float32).max


def add_square_sums_(grad: Tensor, rows: Tensor, columns: Tensor, workspace: Tensor) -> None:
    """Write the sums of G² along the rows to ``rows``, and add those along the columns to ``columns``.

    Args:
        grad: G, (..., rows, n).
        rows: (..., rows, 1).
        columns: (..., 1, n).
        workspace: float32 memory of G's shape, for the squares.
    """
    values = grad.float() if grad.dtype == torch.float32 else workspace.copy_(grad)
    squares = torch.mul(values, values, out=workspace)
    torch.sum(squares, -1, keepdim=True, out=rows)
    columns.add_(squares.sum(-2, keepdim=True))


def average_(average: Tensor, sums: Tensor, count: int, beta: float, eps: float) -> None:
    """V ← β·V + (1 − β)·(sums / count + ε); see :func:`saturate_`."""
    average.mul_(beta).add_(sums, alpha=(1 - beta) / count).add_((1 - beta) * eps)


def saturate_(average: Tensor) -> Tensor:
    """Clamp infinite averages to the largest float, so that later squares can decrease them."""
    return average.clamp_(max=LARGEST_FLOAT)


class Scales(NamedTuple):
    """Factors of the gradient: U = R · V with V = G · C.

    Attributes:
        rows: R, (..., rows, 1); None where every element has a factor of its own.
        columns: C, (..., 1, n), or one for every element.
    """

    rows: Tensor | None
    columns: Tensor


def factored_scales(row_var: Tensor, row_mean: Tensor, col_var: Tensor) -> Scales:
    """Return the scales of a factored second moment: √mean(row) / √row and 1 / √col, without overflow.

    Args:
        row_var: (..., rows, 1); infinite averages are made finite.
        row_mean: Their mean over rows, (..., 1, 1); it is written over.
        col_var: (..., 1, n); infinite where squares overflow, which leaves those columns unchanged.
    """
    root = row_mean.clamp_(max=LARGEST_MEAN).sqrt_().div_(BALANCE)
    return Scales(saturate_(row_var).rsqrt().mul_(root), col_var.rsqrt().mul_(BALANCE))


def normalise(grad: Tensor, scales: Scales) -> Tensor:
    """U, in float32."""
    update = scale_columns(grad, scales.columns)
    return update if scales.rows is None else update.mul_(scales.rows)


def scale_columns(grad: Tensor, scale: Tensor, workspace: Tensor | None = None) -> Tensor:
    """V = G · C in float32, without the rows' factors; written into ``workspace`` if given."""
    # bfloat16 and float16 gradients are promoted by the float32 scale, in the same pass.
    return torch.mul(grad.float() if grad.dtype == torch.float64 else grad, scale, out=workspace)


class Estimator(NamedTuple):
    """Update rule of a sketched momentum, and the direction of a step: D = a U + decode(X) with a correction X.

    With ``residual``, momentum inside the sketched subspace and the fresh gradient outside it::

        M ← β₁ transfer(M) + (1 − β₁) encode(U)        D = U + decode((M − encode(U)) (P Pᵀ)⁻¹)

    otherwise the paper's unbiased estimator, with M decoded by the projection that encoded it::

        D = (1 − β₁) U + decode_old(β₁ M)              M ← β₁ transfer(M) + (1 − β₁) encode(U)

    Attributes:
        projection: P of this step.
        previous: P of the previous step on resample steps, else None.
        beta1: β₁.
        residual: True for the first estimator.
    """

    projection: Projection
    previous: Projection | None
    beta1: float
    residual: bool

    @property
    def update_weight(self) -> float:
        """Weight a of U in D."""
        return 1.0 if self.residual else 1 - self.beta1

    @property
    def decoder(self) -> Projection:
        """Projection that decodes X."""
        return self.projection if self.residual or self.previous is None else self.previous

    def correction(
        self, sketch: Tensor, momentum: Tensor, workspace: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return X, the next M, and ‖D‖² − a²‖U‖² (0 where it is not known) of encode(U) and M, each (..., rows, k).

        It is Σ X (2a encode(U) + X diag(P Pᵀ)); with ``residual`` that is Σ X (encode(U) + the next M).

        Args:
            sketch: encode(U).
            momentum: M.
            workspace: Memory of their shape, ``sketch``'s own too.
        """
        transferred = momentum
        if self.previous is not None:
            transferred = self.projection.transfer(momentum, self.previous, orthogonal=self.residual)
        if not self.residual:
            next_momentum = torch.lerp(transferred, sketch, 1 - self.beta1)
            del transferred
            correction = momentum * self.beta1
            if not self.has_closed_form_norm:
                return correction, next_momentum, torch.zeros_like(sketch[0, 0, 0])
            assert isinstance(self.projection, BucketProjection)
            weighed = torch.mul(sketch, 2 * self.update_weight, out=workspace).addcmul_(
                correction, self.projection.gram
            )
            return correction, next_momentum, weighed.mul_(correction).sum()
        assert isinstance(self.projection, BucketProjection)
        del momentum
        change = transferred - sketch
        del transferred  # frees its memory
        next_momentum = torch.add(sketch, change, alpha=self.beta1)
        correction = change.mul_(self.beta1 / self.projection.gram)
        return correction, next_momentum, torch.add(sketch, next_momentum, out=workspace).mul_(correction).sum()

    @property
    def has_closed_form_norm(self) -> bool:
        """True if ‖D‖² follows from sketches: decode is the transpose of encode, and P Pᵀ is diagonal."""
        return self.decoder is self.projection and isinstance(self.projection, BucketProjection)


def add_correction_(update: Tensor, correction: Tensor, estimator: Estimator) -> Tensor:
    """Return D = a U + decode(X), in U's memory."""
    if estimator.update_weight != 1:
        update.mul_(estimator.update_weight)
    return estimator.decoder.add_decoded_(update, correction)


def square_norm(values: Tensor, rows: Tensor | None = None) -> Tensor:
    """‖R · values‖² in float32, without a tensor of squares.

    Args:
        values: Any shape, or (..., rows, n) with R.
        rows: R, (..., rows, 1); None: 1.
    """
    dtype = promote_types(values.dtype, torch.float32)
    if rows is not None:
        norms: Tensor = linalg.vector_norm(values, dim=-1, keepdim=True, dtype=dtype)
        return norms.mul_(rows).square_().sum()
    norm: Tensor = linalg.vector_norm(values, dtype=dtype)
    return norm.float().square()


def parameter_scale(norm: Tensor, numel: int | Tensor, least: float) -> Tensor:
    """Return max(RMS(W), ε₂) of ‖W‖²: the unit of α with ``scale_parameter``."""
    return (norm / numel).sqrt_().clamp_(min=least)


def clipped_step_size(alpha: float | Tensor, square: Tensor, numel: int | Tensor, threshold: float) -> Tensor:
    """α / max(1, RMS(D) / threshold), of ‖D‖²; of one tensor, or of several at once."""
    # Rounding may make a tiny ‖D‖² negative.
    rms = square.clamp(min=0).div_(numel).sqrt_()
    return alpha / rms.div_(threshold).clamp_(min=1.0)


def descend_(param: Tensor, direction: Tensor, keep: Tensor | None, size: Tensor, bits: Tensor | None) -> None:
    """W ← keep·W − size·D, in float32 (or the parameter's precision where that is higher).

    Args:
        param: W.
        direction: D, or D without a factor of its rows.
        keep: Factor of W from weight decay; None: 1.
        size: α over the clipping, times that factor.
        bits: Random bits for a bfloat16 parameter; None rounds to nearest.
    """
    exact = param.to(promote_types(param.dtype, torch.float32))
    if keep is not None:
        exact = exact.mul_(keep)
    exact = exact.addcmul_(direction.to(exact.dtype), size.to(exact.dtype), value=-1)
    if exact.dtype != param.dtype:
        param.copy_(exact if bits is None else round_to_bfloat16(exact, bits))
