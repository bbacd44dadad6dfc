"""Power iterations in every bucket, which learn the weights of adaptive projections."""

from typing import Final

import triton
import triton.language as tl

from floragrad._streams import ADAPTIVE_NOISE
from floragrad.torch.backends.triton.kernels import draws, fields
from floragrad.torch.backends.triton.kernels.fields import address, field, region
from floragrad.torch.backends.triton.kernels.storage import load_rows
from floragrad.torch.backends.triton.kernels.tile import columns_of, operands, scaled_gradient

_NOISE: Final = tl.constexpr(ADAPTIVE_NOISE)


@triton.jit
def normalised(weight: tl.tensor, fallback: tl.tensor) -> tl.tensor:
    """Return weights (slices, buckets) with norm 1 in each bucket; ``fallback`` in buckets that are zero."""
    largest = tl.max(tl.abs(weight), 0)[None, :]
    # Scaled to magnitudes around 1, whose squares neither overflow nor underflow.
    around_one = tl.div_rn(weight, tl.broadcast_to(tl.where(largest == 0.0, 1.0, largest), weight.shape))
    norm = tl.sqrt_rn(tl.sum(around_one * around_one, 0))[None, :]
    return tl.where(largest == 0.0, fallback, tl.div_rn(around_one, tl.broadcast_to(norm, weight.shape)))


@triton.jit
def begin_learning(
    table: tl.tensor,
    workspace: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    ALIGNED: tl.constexpr,
    SLICES: tl.constexpr,
    BUCKETS: tl.constexpr,
) -> None:
    """Keep the old weights, and start from them with a little noise, of norm 1 in each bucket.

    Grid: blocks of buckets, matrices, tensors.
    """
    matrix, tensor = tl.program_id(1), tl.program_id(2)
    bucket = tl.program_id(0) * BUCKETS + tl.arange(0, BUCKETS)
    column, there = columns_of(bucket, width, columns, SLICES)
    weights = address(table, tensor, fields.WEIGHT, tl.float32, ALIGNED) + matrix * columns
    weight = tl.load(weights + column, mask=there, other=0.0)
    tl.store(region(workspace, table, tensor, fields.OLD_WEIGHT) + matrix * columns + column, weight, mask=there)
    seed, tensor_id = field(table, tensor, fields.SEED), field(table, tensor, fields.TENSOR_ID)
    word = draws.random_words(
        seed, tensor_id, field(table, tensor, fields.RESAMPLE_INDEX), draws.ADAPTIVE_NOISE, column
    )
    uniform = (word >> 11).to(tl.float64) * (2.0**-52) - 1.0
    noise = (uniform * (_NOISE * tl.sqrt(tl.cast(3 * width, tl.float64) / columns))).to(tl.float32)
    start = normalised(tl.where(there, weight + noise, 0.0), weight)
    tl.store(region(workspace, table, tensor, fields.LEARNER) + matrix * columns + column, start, mask=there)


@triton.jit
def power_products(
    table: tl.tensor,
    workspace: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    all_rows: tl.tensor,
    pieces: tl.tensor,
    floor: tl.tensor,
    row_programs: tl.tensor,
    beta1: tl.tensor,
    fresh: tl.tensor,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    FACTORED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    BUCKETS: tl.constexpr,
) -> None:
    """Write Vᵀ(V w) of some rows, with V = β₁ decode(M) + (1 − β₁) U and the learner w.

    Grid: programs of rows x blocks of buckets, matrices, tensors.
    """
    blocks = tl.cdiv(width, BUCKETS)
    program, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    matrix, tensor = tl.program_id(1), tl.program_id(2)
    grad, data, scale, row_var, variance, root = operands(
        table, workspace, tensor, matrix, pieces, all_rows, floor, GRAD, STATE, True, FACTORED, ALIGNED
    )
    bucket = block * BUCKETS + tl.arange(0, BUCKETS)
    column, in_columns = columns_of(bucket, width, columns, SLICES)
    factor = tl.full([SLICES, BUCKETS], 1.0, tl.float32)
    if FACTORED:
        factors = region(workspace, table, tensor, fields.FACTORS) + matrix * columns
        factor = tl.load(factors + column, mask=in_columns, other=0.0)
    learners = region(workspace, table, tensor, fields.LEARNER) + matrix * columns
    learner = tl.load(learners + column, mask=in_columns, other=0.0)
    olds = region(workspace, table, tensor, fields.OLD_WEIGHT) + matrix * columns
    old = tl.load(olds + column, mask=in_columns, other=0.0)
    product = tl.zeros([SLICES, BUCKETS], tl.float32)
    for top in range(program * ROWS, rows, row_programs * ROWS):
        lane = top + tl.arange(0, ROWS)
        in_rows, row = lane < rows, (matrix * rows + lane).to(tl.int64)
        v, r = scaled_gradient(
            grad, variance, row_var, row, in_rows, column, in_columns, columns, factor, root, FACTORED
        )
        kept = load_rows(data, scale, row, block * BUCKETS, width, in_rows, STATE, ROWS, BUCKETS)
        blended = v * (fresh * r)[:, None, None] + old[None, :, :] * (beta1 * kept)[:, None, :]
        sketch = tl.sum(blended * learner[None, :, :], 1)
        product += tl.sum(blended * sketch[:, None, :], 0)
    partials = region(workspace, table, tensor, fields.POWER_PARTIALS) + (matrix * row_programs + program) * columns
    tl.store(partials + column, product, mask=in_columns)


@triton.jit
def end_iteration(
    table: tl.tensor,
    workspace: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    chunks: tl.tensor,
    ADDED_UP: tl.constexpr,
    IS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    SLICES: tl.constexpr,
    BUCKETS: tl.constexpr,
) -> None:
    """Write the learner, the product with norm 1 in each bucket; and the projection's weight where ``IS_LAST``.

    ``ADDED_UP``: the product is a sum over shards.

    Grid: blocks of buckets, matrices, tensors.
    """
    matrix, tensor = tl.program_id(1), tl.program_id(2)
    bucket = tl.program_id(0) * BUCKETS + tl.arange(0, BUCKETS)
    column, there = columns_of(bucket, width, columns, SLICES)
    partials = region(workspace, table, tensor, fields.COL_SUMS if ADDED_UP else fields.POWER_PARTIALS)
    product = tl.zeros([SLICES, BUCKETS], tl.float32)
    for chunk in range(0, chunks):
        product += tl.load(partials + (matrix * chunks + chunk) * columns + column, mask=there, other=0.0)
    learners = region(workspace, table, tensor, fields.LEARNER) + matrix * columns + column
    new_weight = normalised(product, tl.load(learners, mask=there, other=0.0))
    tl.store(learners, new_weight, mask=there)
    if IS_LAST:
        weights = address(table, tensor, fields.WEIGHT, tl.float32, ALIGNED) + matrix * columns
        tl.store(weights + column, new_weight, mask=there)
