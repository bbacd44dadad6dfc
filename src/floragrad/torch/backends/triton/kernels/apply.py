"""Third pass: the momentum moves on, and W ← keep · W − size · D."""

import triton
import triton.language as tl

from floragrad.torch.backends.triton.kernels import draws, fields
from floragrad.torch.backends.triton.kernels.fields import address, ordered_sum, region, words_in
from floragrad.torch.backends.triton.kernels.storage import (
    FLOAT32,
    cut_to_bfloat16,
    load_rows,
    nearest_noise,
    store_rows,
)
from floragrad.torch.backends.triton.kernels.tile import (
    NONE,
    SKETCH,
    bucket_sizes,
    column_vectors,
    columns_of,
    direction_of,
    operands,
    scaled_gradient,
)


@triton.jit
def step_size(
    squares: tl.tensor,
    partials: tl.tensor,
    param_squares: tl.tensor,
    param_partials: tl.tensor,
    lr: tl.tensor,
    least: tl.tensor,
    clip_threshold: tl.tensor,
    numel: tl.tensor,
    READS_LR: tl.constexpr,
    SCALES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return α = lr · max(ε₂, rms(W)), and α / max(1, rms(D) / threshold).

    Args:
        squares: The partial sums of ‖D‖².
        partials: How many they are.
        param_squares: Those of ‖W‖².
        param_partials: How many they are.
        lr: The learning rate, or a pointer to it.
        least: ε₂.
        clip_threshold: Of rms(D); infinite where nothing is clipped.
        numel: StepScalars of the tensor, on all devices.
        READS_LR: Whether ``lr`` is a pointer.
        SCALES: Whether α is in units of rms(W).
    """
    alpha = tl.load(lr).to(tl.float32) if READS_LR else lr
    if SCALES:
        rms = tl.sqrt_rn(ordered_sum(param_squares, param_partials) / numel)
        alpha = alpha * tl.where(rms < least, least, rms)
    ratio = tl.sqrt_rn(ordered_sum(squares, partials) / numel) / clip_threshold
    return alpha, alpha / tl.where(ratio < 1.0, 1.0, ratio)


@triton.jit
def apply(
    table: tl.tensor,
    workspace: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    all_rows: tl.tensor,
    pieces: tl.tensor,
    floor: tl.tensor,
    row_programs: tl.tensor,
    partials: tl.tensor,
    param_partials: tl.tensor,
    beta1: tl.tensor,
    fresh: tl.tensor,
    lr: tl.tensor,
    sign: tl.tensor,
    decay: tl.tensor,
    least: tl.tensor,
    clip_threshold: tl.tensor,
    numel: tl.tensor,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FACTORED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESAMPLES: tl.constexpr,
    ROUNDS: tl.constexpr,
    READS_LR: tl.constexpr,
    SCALES: tl.constexpr,
    ADDED_UP: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    BUCKETS: tl.constexpr,
) -> None:
    """Update every ``row_programs``-th tile of rows of some buckets.

    ``ADDED_UP``: ‖D‖² and ‖W‖² are sums over shards. ``ROUNDS``: a bfloat16 parameter is rounded stochastically.

    Grid: as that of the direction.
    """
    blocks = tl.cdiv(width, BUCKETS)
    program, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    matrix, tensor = tl.program_id(1), tl.program_id(2)
    SIGNED: tl.constexpr = MOMENTUM == SKETCH and FACTORED and not ADAPTIVE and not RESAMPLES
    squares = region(workspace, table, tensor, fields.NORM if ADDED_UP else fields.SQUARES)
    param_squares = region(workspace, table, tensor, fields.PARAM_NORM if ADDED_UP else fields.PARAM_SQUARES)
    alpha, size = step_size(
        squares, partials, param_squares, param_partials, lr, least, clip_threshold, numel, READS_LR, SCALES
    )
    keep, size = 1.0 - alpha * decay, size * sign
    grad, data, scale, row_var, variance, root = operands(
        table, workspace, tensor, matrix, pieces, all_rows, floor, GRAD, STATE, MOMENTUM != NONE, FACTORED, ALIGNED
    )
    param = address(table, tensor, fields.PARAM, PARAM, ALIGNED)
    bucket = block * BUCKETS + tl.arange(0, BUCKETS)
    column, in_columns = columns_of(bucket, width, columns, SLICES)
    factor, weight, old = column_vectors(
        table,
        workspace,
        tensor,
        matrix,
        column,
        in_columns,
        columns,
        FACTORED,
        SIGNED,
        ADAPTIVE,
        RESAMPLES,
        SLICES,
        ALIGNED,
    )
    sizes = bucket_sizes(bucket, width, columns, ADAPTIVE)
    state_rows = words_in(region(workspace, table, tensor, fields.STATE_ROWS))
    param_rows = words_in(region(workspace, table, tensor, fields.PARAM_ROWS))
    state_word, param_word = bucket, column
    if MOMENTUM != NONE and STATE != FLOAT32:
        words = words_in(region(workspace, table, tensor, fields.STATE_COLUMNS))
        state_word = tl.load(words + bucket, mask=bucket < width, other=0)
    if ROUNDS:
        words = words_in(region(workspace, table, tensor, fields.PARAM_COLUMNS))
        param_word = tl.load(words + column, mask=in_columns, other=0)
    for top in range(program * ROWS, rows, row_programs * ROWS):
        lane = top + tl.arange(0, ROWS)
        in_rows, row = lane < rows, (matrix * rows + lane).to(tl.int64)
        v, r = scaled_gradient(
            grad, variance, row_var, row, in_rows, column, in_columns, columns, factor, root, FACTORED
        )
        kept = tl.zeros([ROWS, BUCKETS], tl.float32)
        if MOMENTUM != NONE:
            kept = load_rows(data, scale, row, block * BUCKETS, width, in_rows, STATE, ROWS, BUCKETS)
        d, next_momentum = direction_of(
            v, r, kept, factor, weight, old, sizes, beta1, fresh, MOMENTUM, SIGNED, RESIDUAL, RESAMPLES
        )
        if MOMENTUM != NONE:
            bits = tl.zeros([ROWS, BUCKETS], tl.int32)
            if STATE != FLOAT32:
                row_word = tl.load(state_rows + row, mask=in_rows, other=0)
                bits = draws.rounding_bits(row_word[:, None], state_word[None, :])
            next_momentum = tl.where((bucket < width)[None, :], next_momentum, 0.0)
            store_rows(next_momentum, data, scale, row, block * BUCKETS, width, in_rows, bits, STATE, ROWS, BUCKETS)
        in_tile = in_rows[:, None, None] & in_columns[None, :, :]
        where = param + (row * columns)[:, None, None] + column[None, :, :]
        w = tl.load(where, mask=in_tile, other=0.0).to(tl.float32) * keep - d * size
        if ROUNDS:
            row_word = tl.load(param_rows + row, mask=in_rows, other=0)
            bits = draws.rounding_bits(row_word[:, None, None], param_word[None, :, :])
            tl.store(where, cut_to_bfloat16(w, bits & 0xFFFF), mask=in_tile)
        elif PARAM == tl.bfloat16:
            tl.store(where, cut_to_bfloat16(w, nearest_noise(w)), mask=in_tile)
        else:
            tl.store(where, w.to(PARAM), mask=in_tile)
