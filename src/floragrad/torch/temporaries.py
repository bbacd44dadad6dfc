"""Memory that a step or a window of gradients takes on a CPU beside its operands, in closed form.

Operands are parameters, gradients, state and sketches. Nothing is run or allocated, so a model of any size may be on
the meta device. The results are upper bounds, which tests compare with measured bytes: of the C++ kernels to the byte
but for single numbers, of the eager code at most 30% above.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from math import ceil
from typing import Any, Final

import torch

from floragrad.policy import QUANTIZATION_BLOCK, AccumulatorPlan, StateDtype, storage
from floragrad.torch.accumulation.sketch import fold_blocks
from floragrad.torch.backends.cpu import fold as cpu_fold
from floragrad.torch.backends.cpu import step as cpu_step
from floragrad.torch.backends.cpu.library import DTYPES, library
from floragrad.torch.backends.eager import sketch_blocks, step_blocks
from floragrad.torch.context import StepContext
from floragrad.torch.options import plan_for
from floragrad.torch.part import Part
from floragrad.torch.random import half_count, sign_count
from floragrad.torch.storage import Block

SINGLE: Final = 64
"""Bytes of tensors of one element."""
_CPU: Final = torch.device("cpu")


def step_bytes(groups: Iterable[dict[str, Any]]) -> int:
    """Return the most bytes that ``Flora.step`` holds at once, of a step that resamples.

    Args:
        groups: Parameter groups of a Flora with ``projection="sign"``, or parts of them; the parameters are whole.

    Raises:
        NotImplementedError: Another projection.

    Example:
        >>> from floragrad import Flora
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(4096, 4096)
        >>> step_bytes(Flora(model.parameters(), lr=1e-3).param_groups) < model.weight.nbytes // 4
        True
    """
    steps = [step for group in groups for step in _steps(group)]
    native = [step for step in steps if not _unsupported_reason(*step)]
    eager = [_eager_step_bytes(*step) for step in steps if _unsupported_reason(*step)]
    return max(cpu_step.temporary_bytes(native), *eager, 0) + SINGLE if steps else 0


def fold_bytes(plan: AccumulatorPlan, dtype: torch.dtype) -> int:
    """Return the most bytes that the fold of a gradient into a sketch holds.

    Args:
        plan: Of the sketch.
        dtype: Of the gradient.
    """
    sizes = _column_bytes(plan)
    if library() is not None and dtype in DTYPES:
        return max(2 * sizes, sizes + cpu_fold.temporary_bytes(plan)) + SINGLE
    height, is_one = _rows(fold_blocks(plan.view, _CPU))
    block, sketch = 4 * height * plan.view.columns, 4 * height * plan.width
    words = 0 if plan.state_dtype == "float32" else 8 * half_count(plan.view.batch * plan.view.rows + plan.width)
    converted = 0 if dtype == torch.float32 else block
    rounding = _save_bytes(plan.state_dtype, height, plan.width)
    earlier, payload = (0, 0) if is_one else (sketch, _payload_bytes(plan.state_dtype, height, plan.width))
    if plan.ratio > 1:
        fresh, made = sketch, converted + block + sketch * (1 + (plan.view.columns % plan.width > 0))
    else:
        fresh = block if sizes else converted
        made = converted + (block if sizes else 0 if is_one else fresh)
    held = 3 * sizes + _sign_bytes(plan)
    return words + held + payload + max(earlier + made, fresh + sketch + max(earlier, rounding)) + SINGLE


def norm_bytes(plan: AccumulatorPlan) -> int:
    """Return the most bytes that the squared norm of a sketch takes."""
    height, is_one = _rows(fold_blocks(plan.view, _CPU))
    loaded = _load_bytes(plan.state_dtype, height, plan.width)
    before = 0 if is_one or not loaded else 4 * height * plan.width
    return _column_bytes(plan) + max(_column_bytes(plan), before + loaded) + SINGLE


def decode_bytes(plan: AccumulatorPlan, *, adds: bool) -> int:
    """Return the most bytes that decoding a sketch into a gradient takes.

    Args:
        plan: Of the sketch.
        adds: True if it is added to the gradient.
    """
    height, is_one = _rows(fold_blocks(plan.view, _CPU))
    block = 4 * height * plan.view.columns
    loaded = _load_bytes(plan.state_dtype, height, plan.width)
    is_in_place = plan.ratio == 1 and plan.state_dtype == "float32"  # rows are read where they lie
    rows = block if is_in_place and not adds else 2 * block
    if plan.view.columns % plan.width:
        rows += loaded
    before = 0 if is_one or is_in_place else block
    return 3 * _column_bytes(plan) + _sign_bytes(plan) + max(rows, before + loaded) + SINGLE


def _steps(group: dict[str, Any]) -> Iterator[tuple[torch.dtype, StepContext]]:
    """Yield dtype and context of the group's parameters that are not empty."""
    if group["projection"] != "sign":
        raise NotImplementedError(f"temporaries of {group['projection']} projections are not known in closed form")
    for param in group["params"]:
        if param.numel() and param.requires_grad:
            plan = plan_for(param.shape, group)
            part = Part.whole(plan.shape, plan.view)
            yield param.dtype, StepContext(plan, group, 0, group["kappa"], _CPU, part)


def _unsupported_reason(dtype: torch.dtype, ctx: StepContext) -> str:
    """Return why the kernels do not support a parameter; empty if they do."""
    return cpu_step.unsupported_reason(torch.empty(0, dtype=dtype, device=_CPU), ctx.plan, ctx.part)


def _eager_step_bytes(dtype: torch.dtype, ctx: StepContext) -> int:
    """Return the most bytes that the eager code holds in any pass of one tensor: its blocks, and what stays for all."""
    plan, (batch, all_rows, columns) = ctx.plan, ctx.view
    rows, width = batch * all_rows, plan.width if ctx.is_sketched else columns
    rounds, copied = ctx.rounds_parameter(dtype), 0 if dtype == torch.float32 else 1
    height, is_one = _rows(step_blocks(ctx))
    block, small = 4 * height * columns, 4 * _rows(step_blocks(ctx, rounds=rounds))[0] * columns
    words = 8 * half_count(rows + width) if plan.momentum != "none" and ctx.state_dtype != "float32" else 0
    words += 8 * half_count(rows + ctx.parameter_width) if rounds else 0
    is_low_bit = plan.second_moment_dtype != "float32"
    words += 8 * half_count(rows + columns) if is_low_bit else 0
    scales = 4 * (rows + batch * columns) if plan.factored else 0
    factors = 0 if plan.factored else 1  # blocks of factors of single elements
    statistics: float = 2 * scales + block if plan.factored else (1 + copied + (not is_one)) * block
    if is_low_bit:  # random bits, averages, levels, their two values, and the levels in 8 bits; scales
        statistics = 5.25 * block + 12 * height * ceil(columns / QUANTIZATION_BLOCK)
    passes: list[float] = [statistics]
    held, direction = scales, factors * small
    if ctx.is_sketched:
        words += 2 * 8 * sign_count(columns)
        part_height, part_is_one = _rows(sketch_blocks(ctx))
        part, sketches = 4 * part_height * width, 4 * rows * width
        shares = 1 + (not is_one) + (columns % width > 0)
        encoding = 4 * (batch * columns + rows) + (1 + factors * (2 - is_one)) * block + 4 * shares * height * width
        loaded = _load_bytes(ctx.state_dtype, part_height, width)
        correcting = max(loaded, (part if loaded else 0) + 2 * part) + (0 if part_is_one else part)
        storing = part + _save_bytes(ctx.state_dtype, part_height, width)
        held += 2 * 4 * (columns + width) + sketches
        passes += [held + 8 * columns, held + encoding, held + 4 * width + max(correcting, storing)]
    elif plan.momentum == "whole":
        passes.append(held + (1 + factors) * block + _load_bytes(ctx.state_dtype, height, columns))
        small_height = small // (4 * columns)
        direction += _load_bytes(ctx.state_dtype, small_height, columns)
        direction = max(direction, _save_bytes(ctx.state_dtype, small_height, columns))
    if plan.momentum != "whole":
        held += 4 * rows if plan.factored else 0  # step sizes of rows
        passes.append(held + (1 + factors) * block)
    # The float32 copy; random bits, those added to it, and the rounded copy.
    passes.append(held + small + max(direction, (3.5 if rounds else 1) * copied * small))
    return int(words + max(passes))


def _rows(blocks: Iterable[Block]) -> tuple[int, bool]:
    """Return the number of rows of the first block, which is the largest, and True if it is the only one."""
    heights = [matrices.stop * rows.stop for matrices, rows in islice(blocks, 2)]
    return heights[0] if heights else 0, len(heights) == 1


def _column_bytes(plan: AccumulatorPlan) -> int:
    """Return the bytes of the divisors of columns."""
    return plan.buffers["col_var"].nbytes if "col_var" in plan.buffers else 0


def _sign_bytes(plan: AccumulatorPlan) -> int:
    """Return the bytes of a projection."""
    return 4 * (plan.view.columns + plan.width) if plan.ratio > 1 else 0


def _payload_bytes(state_dtype: StateDtype, rows: int, width: int) -> int:
    """Return the bytes of rounded rows."""
    return 0 if state_dtype == "float32" else sum(each.nbytes for each in storage((rows,), width, state_dtype).values())


def _load_bytes(state_dtype: StateDtype, rows: int, width: int) -> int:
    """Return the bytes that loading rows as float32 takes; int4 is unpacked in pairs before."""
    if state_dtype == "float32":
        return 0
    return 4 * rows * width + (rows * (width + width % 2) if state_dtype == "int4" else 0)


def _save_bytes(state_dtype: StateDtype, rows: int, width: int) -> int:
    """Return the bytes that rounding float32 rows takes: random bits, the grid, and what becomes of it."""
    if state_dtype == "float32":
        return 0
    halves = {"bfloat16": 4, "int8": 2, "int4": 5 + 2 * (width % 2)}[state_dtype]  # int4 packs pairs, padded
    made = halves * rows * (width + width % 2) // 2
    return 8 * rows * width + made + 12 * rows * ceil(width / QUANTIZATION_BLOCK)
