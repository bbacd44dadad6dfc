"""Fold of gradients into a sketch, and its decoding, by the Triton kernels."""

import torch
from torch import Tensor

from floragrad.policy import AccumulatorPlan, MatrixView
from floragrad.torch.backends.triton.geometry import Tiles
from floragrad.torch.backends.triton.kernels.fold import add_errors, decode, fold
from floragrad.torch.backends.triton.launch import Launch, current_device
from floragrad.torch.backends.triton.spec import STATE_DTYPES
from floragrad.torch.part import Part


def fold_triton(
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
    """C ← C + w·encode(G), as ``GradientSketch.add`` does, in one launch; with the noise measured, one more.

    Args:
        grad: G, contiguous, float32, bfloat16 or float16.
        buffers: Of the sketch.
        plan: Of the sketch, without Gaussian projection.
        columns: Divisors of columns, float32 of (batch, 1, columns); None: 1.
        part: The local part of the tensor, not split along its columns.
        is_first: True for the first fold, where the content of the buffers is undefined.
        weight: w.
        seed: Of projections and of rounding.
        tensor_id: Key of the tensor's random streams.
        window: Index of the window, of its projection.
        counter: Of this fold's rounding.
        measure_noise: Add the squared rounding errors to ``buffers["noise"]``.
    """
    view, width = _layout(plan)
    tiles = Tiles.of(*view, width)
    assert part.row_words is not None
    first_row, matrix_rows = part.row_words
    measures = measure_noise and "noise" in buffers
    partials = view.batch * tiles.programs
    errors = grad.new_empty(partials if measures else 0, dtype=torch.float32)
    launches = [
        Launch(
            fold,
            (tiles.programs, view.batch, 1),
            {
                "grad": grad,
                "data": buffers["data"],
                "scale": buffers.get("scale", errors),
                "column_sizes": errors if columns is None else columns,
                "errors": errors,
                "rows": view.rows,
                "columns": view.columns,
                "width": width,
                "row_programs": tiles.row_programs,
                "first_row": first_row,
                "matrix_rows": matrix_rows,
                "row_words": part.row_count,
                "weight": float(weight),
                "seed": seed,
                "tensor_id": tensor_id,
                "window": window,
                "counter": counter,
            },
            {
                "STATE": STATE_DTYPES[plan.state_dtype],
                "IS_FIRST": is_first,
                "DIVIDES": columns is not None,
                "MEASURES": measures,
                "ROWS": tiles.rows,
                "SLICES": tiles.slices,
                "BUCKETS": tiles.buckets,
            },
            tiles.warps,
        )
    ]
    if measures:
        given: dict[str, Tensor | int | float] = {"noise": buffers["noise"], "errors": errors, "count": partials}
        launches.append(Launch(add_errors, (1, 1, 1), given, {}))
    with current_device(grad.device):
        for launch in launches:
            launch.run()


def decode_triton(
    grad: Tensor,
    buffers: dict[str, Tensor],
    plan: AccumulatorPlan,
    columns: Tensor | None,
    *,
    grad_weight: float,
    factor: float | Tensor,
    orthogonal: bool,
    seed: int,
    tensor_id: int,
    window: int,
) -> Tensor | None:
    """G ← factor · (grad_weight · G + decode(C)), as ``GradientSketch.decode_into`` does, in one launch.

    Args:
        grad: G, contiguous, float32, bfloat16 or float16; not read where ``grad_weight`` is 0.
        buffers: Of the sketch.
        plan: Of the sketch, without Gaussian projection.
        columns: Divisors of columns; None: 1.
        grad_weight: Weight of the values in ``grad``.
        factor: Factor of the result, a number or a tensor of one element on the gradient's device.
        orthogonal: Decode with (P Pᵀ)⁻¹ P.
        seed: Of projections.
        tensor_id: Key of the tensor's random streams.
        window: Index of the window.

    Returns:
        The sums of squares along columns before the factor, (batch, columns); None where columns were not divided.
    """
    view, width = _layout(plan)
    tiles = Tiles.of(*view, width)
    shape = (view.batch, tiles.row_programs, 0 if columns is None else view.columns)
    squares = grad.new_empty(shape, dtype=torch.float32)
    launch = Launch(
        decode,
        (tiles.programs, view.batch, 1),
        {
            "grad": grad,
            "data": buffers["data"],
            "scale": buffers.get("scale", squares),
            "column_sizes": squares if columns is None else columns,
            "squares": squares,
            "rows": view.rows,
            "columns": view.columns,
            "width": width,
            "row_programs": tiles.row_programs,
            "grad_weight": float(grad_weight),
            "factor": factor if isinstance(factor, Tensor) else float(factor),
            "seed": seed,
            "tensor_id": tensor_id,
            "window": window,
        },
        {
            "ROUNDS": grad.dtype == torch.bfloat16,
            "STATE": STATE_DTYPES[plan.state_dtype],
            "READS_GRAD": grad_weight != 0,
            "READS_FACTOR": isinstance(factor, Tensor),
            "ORTHOGONAL": orthogonal,
            "MULTIPLIES": columns is not None,
            "ROWS": tiles.rows,
            "SLICES": tiles.slices,
            "BUCKETS": tiles.buckets,
        },
        tiles.warps,
    )
    with current_device(grad.device):
        launch.run()
    return None if columns is None else squares.sum(1)


def _layout(plan: AccumulatorPlan) -> tuple[MatrixView, int]:
    """Return the matrices and the width of a row; a tensor without a matrix view is one row."""
    if plan.view.columns > 1:
        return plan.view, plan.width
    return MatrixView(1, 1, plan.view.numel), plan.view.numel
