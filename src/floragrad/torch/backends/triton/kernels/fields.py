"""Table of a launch's tensors: a row of int64 for each tensor, a column for each field.

It holds addresses of parameters, gradients and state, and offsets of workspace regions in elements of four bytes. So a
launch takes any number of tensors, and no value that changes from step to step changes an argument's type.
"""

from typing import Final

import triton
import triton.language as tl

# Addresses.
GRAD: Final = tl.constexpr(0)
PARAM: Final = tl.constexpr(1)
DATA: Final = tl.constexpr(2)
SCALE: Final = tl.constexpr(3)
ROW_VAR: Final = tl.constexpr(4)
COL_VAR: Final = tl.constexpr(5)
VARIANCE: Final = tl.constexpr(6)
WEIGHT: Final = tl.constexpr(7)

# Random streams: their counters, and the positions of the first row's and the first column's word in the tensor.
SEED: Final = tl.constexpr(8)
TENSOR_ID: Final = tl.constexpr(9)
STEP: Final = tl.constexpr(10)
RESAMPLE_INDEX: Final = tl.constexpr(11)
FIRST_ROW: Final = tl.constexpr(12)
FIRST_COLUMN: Final = tl.constexpr(13)

# Offsets in the workspace, each followed by its shape for one tensor.
ROW_PARTIALS: Final = tl.constexpr(14)  # column tiles, matrices, rows: sums of G² over some columns
COL_PARTIALS: Final = tl.constexpr(15)  # matrices, chunks of rows, columns: sums of G² over some rows
COL_SUMS: Final = tl.constexpr(16)  # matrices, columns: sums of G² over all rows
ROW_TOTALS: Final = tl.constexpr(17)  # matrices, pieces: sums of row_var over some rows, but for (1 − β₂) ε₁ of each
FACTORS: Final = tl.constexpr(18)  # matrices, columns: C, times the signs where they are part of it
SIGNS: Final = tl.constexpr(19)  # columns
OLD_SIGNS: Final = tl.constexpr(20)  # columns
STATE_ROWS: Final = tl.constexpr(21)  # rows of all matrices: words to round the momentum with
STATE_COLUMNS: Final = tl.constexpr(22)  # columns of the momentum
PARAM_ROWS: Final = tl.constexpr(23)  # rows of all matrices: words to round the parameter with
PARAM_COLUMNS: Final = tl.constexpr(24)  # columns
PARAM_SQUARES: Final = tl.constexpr(25)  # programs of the first pass: partial sums of ‖W‖²
PARAM_NORM: Final = tl.constexpr(26)  # ‖W‖², on all devices
SQUARES: Final = tl.constexpr(27)  # programs of the second pass: partial sums of ‖D‖²
NORM: Final = tl.constexpr(28)  # ‖D‖², on all devices
LEARNER: Final = tl.constexpr(29)  # matrices, columns: weights of the adaptive projection during power iterations
OLD_WEIGHT: Final = tl.constexpr(30)  # matrices, columns: the previous weights
POWER_PARTIALS: Final = tl.constexpr(31)  # matrices, programs along rows, columns: Vᵀ(V w) of some rows

FIELDS: Final = tl.constexpr(32)


@triton.jit
def field(table: tl.tensor, tensor: tl.tensor, name: tl.constexpr) -> tl.tensor:
    """Return one number of a tensor's row."""
    return tl.load(table + tensor * FIELDS + name)


@triton.jit
def address(
    table: tl.tensor, tensor: tl.tensor, name: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr
) -> tl.tensor:
    """Return a pointer to a parameter, a gradient or a state tensor; ``ALIGNED`` promises a multiple of 16 bytes."""
    pointer = field(table, tensor, name).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def region(workspace: tl.tensor, table: tl.tensor, tensor: tl.tensor, name: tl.constexpr) -> tl.tensor:
    """Return a pointer to a region of the workspace, which begins at a multiple of 128 bytes."""
    return workspace + tl.multiple_of(field(table, tensor, name), 32)


@triton.jit
def words_in(pointer: tl.tensor) -> tl.tensor:
    """Return the pointer to a region of random words, which are integers."""
    return pointer.to(tl.pointer_type(tl.int32))


@triton.jit
def ordered_sum(first: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Sum up ``count`` float32 numbers in an order that depends on their count alone."""
    lanes = tl.arange(0, 1024)
    sums = tl.zeros([1024], tl.float32)
    for start in range(0, count, 1024):
        sums += tl.load(first + start + lanes, mask=start + lanes < count, other=0.0)
    return tl.sum(sums)
