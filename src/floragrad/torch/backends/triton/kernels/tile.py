"""One tile of a tensor: some rows, the columns of some buckets, and the direction of their step.

Column j falls into bucket j mod k, so the columns of a range of buckets are a slice of it in each k columns: a tile is
(rows, slices, buckets). A tensor without a sketch has one slice, and a bucket for every column.
"""

from typing import Final

import triton
import triton.language as tl

from floragrad.torch.backends.triton.kernels import fields
from floragrad.torch.backends.triton.kernels.fields import address, region
from floragrad.torch.backends.triton.kernels.scales import row_factors, row_root
from floragrad.torch.backends.triton.kernels.storage import BFLOAT16, INT4, INT8

NONE: Final = tl.constexpr(0)
WHOLE: Final = tl.constexpr(1)
SKETCH: Final = tl.constexpr(2)


@triton.jit
def payload(table: tl.tensor, tensor: tl.tensor, STATE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Return a pointer to the momentum's payload."""
    if STATE == INT8 or STATE == INT4:
        return address(table, tensor, fields.DATA, tl.int8, ALIGNED)
    elif STATE == BFLOAT16:
        return address(table, tensor, fields.DATA, tl.bfloat16, ALIGNED)
    else:
        return address(table, tensor, fields.DATA, tl.float32, ALIGNED)


@triton.jit
def operands(
    table: tl.tensor,
    workspace: tl.tensor,
    tensor: tl.tensor,
    matrix: tl.tensor,
    pieces: tl.tensor,
    all_rows: tl.tensor,
    floor: tl.tensor,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    KEEPS: tl.constexpr,
    FACTORED: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return pointers to gradient, momentum, its scales, the rows' averages and the whole variance; and the rows' root.

    Pointers that a tensor lacks are those of the gradient. ``KEEPS``: whether there is a momentum.
    """
    grad = address(table, tensor, fields.GRAD, GRAD, ALIGNED)
    data, scale = grad, grad
    if KEEPS:
        data = payload(table, tensor, STATE, ALIGNED)
        scale = address(table, tensor, fields.SCALE, tl.float32, ALIGNED)
    row_var, variance, root = grad, grad, 1.0
    if FACTORED:
        row_var = address(table, tensor, fields.ROW_VAR, tl.float32, ALIGNED)
        totals = region(workspace, table, tensor, fields.ROW_TOTALS) + matrix * pieces
        root = row_root(totals, pieces, all_rows, floor)
    else:
        variance = address(table, tensor, fields.VARIANCE, tl.float32, ALIGNED)
    return grad, data, scale, row_var, variance, root


@triton.jit
def columns_of(
    bucket: tl.tensor, width: tl.tensor, columns: tl.tensor, SLICES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the columns of some buckets, (slices, buckets), and which of them there are."""
    column = tl.arange(0, SLICES)[:, None] * width + bucket[None, :]
    return column, (column < columns) & (bucket < width)[None, :]


@triton.jit
def column_vectors(
    table: tl.tensor,
    workspace: tl.tensor,
    tensor: tl.tensor,
    matrix: tl.tensor,
    column: tl.tensor,
    in_columns: tl.tensor,
    columns: tl.tensor,
    FACTORED: tl.constexpr,
    SIGNED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    RESAMPLES: tl.constexpr,
    SLICES: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return C, and the weights of this projection and of the one that the momentum was written in.

    Vectors that a step does not use are one of the others.
    """
    factor = tl.full(column.shape, 1.0, tl.float32)
    if FACTORED:
        factors = region(workspace, table, tensor, fields.FACTORS) + matrix * columns
        factor = tl.load(factors + column, mask=in_columns, other=0.0)
    weight, old = factor, factor
    if SLICES > 1 and not SIGNED:
        if ADAPTIVE:
            weights = address(table, tensor, fields.WEIGHT, tl.float32, ALIGNED) + matrix * columns
        else:
            weights = region(workspace, table, tensor, fields.SIGNS)
        weight = tl.load(weights + column, mask=in_columns, other=0.0)
        if RESAMPLES:
            if ADAPTIVE:
                olds = region(workspace, table, tensor, fields.OLD_WEIGHT) + matrix * columns
            else:
                olds = region(workspace, table, tensor, fields.OLD_SIGNS)
            old = tl.load(olds + column, mask=in_columns, other=0.0)
    return factor, weight, old


@triton.jit
def bucket_sizes(bucket: tl.tensor, width: tl.tensor, columns: tl.tensor, ADAPTIVE: tl.constexpr) -> tl.tensor:
    """Return the diagonal of P Pᵀ: how many columns a bucket has, or 1 for weights of norm 1."""
    if ADAPTIVE:
        return tl.full(bucket.shape, 1.0, tl.float32)
    else:
        return (columns // width + tl.where(bucket < columns % width, 1, 0)).to(tl.float32)


@triton.jit
def scaled_gradient(
    grad: tl.tensor,
    variance: tl.tensor,
    row_var: tl.tensor,
    row: tl.tensor,
    in_rows: tl.tensor,
    column: tl.tensor,
    in_columns: tl.tensor,
    columns: tl.tensor,
    factor: tl.tensor,
    root: tl.tensor,
    FACTORED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return V = G · C (rows, slices, buckets) and R (rows,) of U = R · V.

    Args:
        grad: Pointers to the gradient, to the variance where it is whole, to the rows' averages where it is factored.
        variance: See above.
        row_var: See above.
        row: Rows counted through all matrices, int64.
        in_rows: Which of them there are.
        column: Columns, (slices, buckets).
        in_columns: Which of them there are.
        columns: How many a row has.
        factor: C, (slices, buckets).
        root: Of the matrix: see ``scales.row_root``.
        FACTORED: Whether the second moment is.
    """
    in_tile = in_rows[:, None, None] & in_columns[None, :, :]
    where = (row * columns)[:, None, None] + column[None, :, :]
    g = tl.load(grad + where, mask=in_tile, other=0.0).to(tl.float32)
    if FACTORED:
        return g * factor[None, :, :], row_factors(root, tl.load(row_var + row, mask=in_rows, other=1.0))
    else:
        average = tl.load(variance + where, mask=in_tile, other=1.0)
        return g * tl.rsqrt(average), tl.full(row.shape, 1.0, tl.float32)


@triton.jit
def with_signs(values: tl.tensor, signs: tl.tensor) -> tl.tensor:
    """Return the values times +1 or -1, whichever the sign bits of ``signs`` say."""
    flip = signs.to(tl.int32, bitcast=True) & -0x80000000
    return (values.to(tl.int32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)


@triton.jit
def direction_of(
    v: tl.tensor,
    r: tl.tensor,
    kept: tl.tensor,
    factor: tl.tensor,
    weight: tl.tensor,
    old: tl.tensor,
    sizes: tl.tensor,
    beta1: tl.tensor,
    fresh: tl.tensor,
    MOMENTUM: tl.constexpr,
    SIGNED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESAMPLES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return D (rows, slices, buckets) and the next M (rows, buckets), as ``update.Estimator`` says.

    With ``RESIDUAL``, momentum inside the sketched subspace and the fresh gradient outside it::

        M ← β₁ transfer(M) + (1 − β₁) encode(U)        D = U + decode((M − encode(U)) (P Pᵀ)⁻¹)

    otherwise the paper's unbiased estimator, M read in the basis that it was written in::

        D = (1 − β₁) U + decode_old(β₁ M)              M ← β₁ transfer(M) + (1 − β₁) encode(U)

    Args:
        v: V of U = R · V, times the signs where ``SIGNED``: signs that stand in the columns' factors.
        r: R.
        kept: M, (rows, buckets).
        factor: C, (slices, buckets).
        weight: Of the projection, (slices, buckets).
        old: Of the one that M was written in; read where ``RESAMPLES``.
        sizes: The diagonal of P Pᵀ, (buckets,).
        beta1: β₁.
        fresh: 1 − β₁.
        MOMENTUM: Whether it is none, whole or a sketch.
        SIGNED: See v.
        RESIDUAL: Which estimator.
        RESAMPLES: Whether the projection differs from that of the step before.
    """
    if MOMENTUM == NONE:
        direction = v * r[:, None, None]
        next_momentum = kept
    elif MOMENTUM == WHOLE:
        next_momentum = kept + fresh * (tl.sum(v, 1) * r[:, None] - kept)
        direction = next_momentum[:, None, :]
    else:
        sketch = tl.sum(v if SIGNED else v * weight[None, :, :], 1) * r[:, None]
        transferred = kept
        if RESAMPLES:
            overlap = tl.sum(weight * old, 0)
            transferred = kept * (overlap / sizes if RESIDUAL else overlap)[None, :]
        if RESIDUAL:
            change = transferred - sketch
            next_momentum = sketch + beta1 * change
            correction = change * (beta1 / sizes)[None, :]
            update = v * r[:, None, None]
        else:
            next_momentum = transferred + fresh * (sketch - transferred)
            correction = beta1 * kept
            update = v * (fresh * r)[:, None, None]
        if SIGNED:
            direction = with_signs(update + correction[:, None, :], factor[None, :, :])
        elif RESAMPLES and not RESIDUAL:
            direction = update + correction[:, None, :] * old[None, :, :]
        else:
            direction = update + correction[:, None, :] * weight[None, :, :]
    return direction, next_momentum
