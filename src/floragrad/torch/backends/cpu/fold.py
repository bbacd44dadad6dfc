"""Fold of a gradient into a sketch by the native kernels."""

from typing import Any

import torch
from torch import Tensor

from floragrad.policy import AccumulatorPlan, MatrixView
from floragrad.torch.backends.cpu.library import (
    DTYPES,
    STATE_DTYPES,
    Fold,
    Library,
    is_addressable,
    library,
    unsupported_tensor,
)
from floragrad.torch.part import Part


def can_fold(grad: Tensor, buffers: dict[str, Tensor], part: Part) -> bool:
    """Return whether the kernels can fold this gradient into the buffers of a sign sketch."""
    if grad.numel() == 0 or part.irregularity or library() is None:
        return False
    return not unsupported_tensor(grad) and all(map(is_addressable, buffers.values()))


def fold_native(
    grad: Tensor,
    buffers: dict[str, Tensor],
    plan: AccumulatorPlan,
    columns: Tensor | None,
    part: Part,
    *,
    is_first: bool,
    weight: float,
    seed: int,
    tensor_id: int,
    window: int,
    counter: int,
    measure_noise: bool,
) -> None:
    """C ← C + w·encode(G), as ``GradientSketch.add`` does; :func:`can_fold` holds.

    Args:
        grad: G, contiguous.
        buffers: Of the sketch.
        plan: Of the sketch.
        columns: Divisors of columns, float32 of (batch, 1, columns); None: 1.
        part: The local part of the tensor.
        is_first: True for the first fold, where the content of the buffers is undefined.
        weight: w.
        seed: Of projections and of rounding.
        tensor_id: Key of the tensor's random streams.
        window: Index of the window, of its projection.
        counter: Of this fold's rounding.
        measure_noise: Add the squared rounding errors to ``buffers["noise"]``.
    """
    kernels = library()
    assert kernels is not None
    assert part.row_words is not None
    first_row_word, matrix_row_words = part.row_words
    measures = measure_noise and "noise" in buffers
    noise = torch.zeros((), dtype=torch.float64, device="cpu") if measures else None
    fold = _described(
        plan,
        kernels,
        value_dtype=DTYPES[grad.dtype],
        is_first=is_first,
        measures=noise is not None,
        all_row_words=part.row_count,
        first_row_word=first_row_word,
        matrix_row_words=matrix_row_words,
        seed=seed,
        tensor_id=tensor_id,
        window=window,
        counter=counter,
        weight=weight,
    )
    scratch = torch.empty(kernels.fold_bytes(fold), dtype=torch.uint8, device="cpu")
    fold.grad, fold.data, fold.scratch = grad.data_ptr(), buffers["data"].data_ptr(), scratch.data_ptr()
    if "scale" in buffers:
        fold.scale = buffers["scale"].data_ptr()
    if columns is not None:
        fold.column_sizes = columns.data_ptr()
    if noise is not None:
        fold.noise = noise.data_ptr()
    kernels.fold(fold)
    if noise is not None:
        buffers["noise"] += noise


def temporary_bytes(plan: AccumulatorPlan) -> int:
    """Return the bytes that :func:`fold_native` holds for a whole tensor."""
    kernels = library()
    assert kernels is not None
    return kernels.fold_bytes(_described(plan, kernels)) + 8  # and the sum of squared errors


def _described(plan: AccumulatorPlan, kernels: Library, **others: Any) -> Fold:
    """Return the kernels' arguments, with the fields that follow from a plan."""
    # A tensor without a matrix view is summed exactly, as one row.
    batch, rows, columns = plan.view if plan.view.columns > 1 else MatrixView(1, 1, plan.view.numel)
    return Fold(
        batch=batch,
        rows=rows,
        columns=columns,
        width=plan.width if plan.view.columns > 1 else columns,
        state_dtype=STATE_DTYPES[plan.state_dtype],
        parallel=kernels.parallel,
        thread_number=kernels.thread_number,
        threads=torch.get_num_threads(),
        **others,
    )
