"""The passes over a tensor that make and apply its update, a block of rows at a time, compiled or not."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from floragrad._streams import Stream
from floragrad.policy import MatrixView, StateDtype
from floragrad.torch import update as pure
from floragrad.torch.projection import BucketProjection, Projection
from floragrad.torch.quantize import RoundingBits, round_to_bfloat16
from floragrad.torch.storage import Block, StoredRows, load, save
from floragrad.torch.tensor_step import TensorStep


class UpdatePasses:
    """The passes over a tensor once its second moment and projections are known.

    Args:
        grads: G in the view of the part.
        scales: What every gradient is multiplied by.
        stored: The momentum.
        projection: P of this step; None where every column is kept, or none.
        previous: P of the step before where it differs.
        sketches: encode(U), summed over the parts of each row; None where rows are whole.
        at: The tensor, its options and the step.
    """

    def __init__(
        self,
        grads: Tensor,
        scales: tuple[Tensor, ...],
        stored: StoredRows,
        projection: Projection | None,
        previous: Projection | None,
        sketches: Tensor | None,
        at: TensorStep,
    ) -> None:
        self._grads, self._scales, self._stored, self._at = grads, scales, stored, at
        self._projection, self._previous, self._sketches = projection, previous, sketches

    def direction_square(self) -> Tensor:
        """‖D‖² of what is here."""
        run = maybe_compiled(_block_square, self._at, *self._specialised())
        total = torch.zeros((), device=self._at.device)
        for where in self._at.blocks():
            total += run(self._ingredients(where))
        return total

    def move(self, param: Tensor, square: Tensor, alpha: Tensor) -> None:
        """Clip, scale and apply D to the parameter; the momentum's buffers move on to the next step."""
        at = self._at
        numel = torch.Size(at.plan.shape).numel()
        # Rounding may make ‖D‖² of next to nothing negative.
        clip = (square.clamp(min=0).div(numel).sqrt() / at.group["clip_threshold"]).clamp(min=1.0)
        keep, size = 1 - alpha * at.group["weight_decay"], alpha / clip
        rounded = param.dtype == torch.bfloat16 and at.group["stochastic_rounding"]
        width = at.plan.view.columns if at.plan.view else 1
        rounding = at.rounding(Stream.PARAMETER_ROUNDING, width, at.part.columns) if rounded else None
        run = maybe_compiled(_block_move, at, *self._specialised())
        # A parameter that is not contiguous in its view is written through a copy.
        viewable = _viewable(param, at.view)
        params = param.view(at.view) if viewable else param.reshape(at.view)
        for where in at.blocks():
            bits = None if rounding is None else rounding.of(where)
            run(params[where], keep, size, bits, self._stored.bits(where), self._ingredients(where))
        if not viewable:
            param.copy_(params.view(param.shape))

    def _specialised(self) -> tuple[Hashable, ...]:
        return self._at.plan, self._at.group["beta1"], self._at.group["residual"]

    def _ingredients(self, where: Block) -> "_Ingredients":
        return _Ingredients(
            self._grads[where],
            scales_of(self._scales, where),
            self._stored.read(where),
            pure.Estimator(
                of_batch(self._projection, where),
                of_batch(self._previous, where),
                self._at.group["beta1"],
                self._at.group["residual"],
            ),
            None if self._sketches is None else self._sketches[where],
            self._stored.dtype,
            self._stored.width,
        )


class _Ingredients(NamedTuple):
    """What a block's direction is made of."""

    grad: Tensor
    scales: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    by: pure.Estimator
    sketch: Tensor | None
    dtype: StateDtype
    width: int

    def momentum(self) -> Tensor:
        """M as it was stored."""
        return load(self.kept, self.dtype, self.width)


def _block_square(of: _Ingredients) -> Tensor:
    """‖D‖² of one block."""
    update = pure.normalise(of.grad, of.scales)
    if not of.kept:
        return pure.square_norm(update)
    return pure.direction_square(update, of.momentum(), of.by, of.sketch)


def _block_move(
    param: Tensor,
    keep: Tensor,
    size: Tensor,
    bits: RoundingBits | None,
    state_bits: RoundingBits | None,
    of: _Ingredients,
) -> None:
    """Normalise, load, move and store the momentum of one block, and move the parameter, both in place."""
    direction = pure.normalise(of.grad, of.scales)
    if of.kept:
        direction, following = pure.momentum_step(direction, of.momentum(), of.by, of.sketch)
        for buffer, value in zip(of.kept, save(following, of.dtype, state_bits), strict=True):
            buffer.copy_(value)
        del following
    moved = pure.descend(param, direction, keep, size)
    param.copy_(moved if bits is None else round_to_bfloat16(moved, bits.numbers()))


def scales_of(scales: tuple[Tensor, ...], where: Block) -> tuple[Tensor, ...]:
    """Row and column factors of a block, or the reciprocal root of its variance."""
    if len(scales) == 1:
        return (scales[0][where].rsqrt(),)
    row_factor, col_factor = scales
    return row_factor[where], col_factor[where[0]]


def of_batch(projection: Any, where: Block) -> Any:
    """The projection of the matrices of a block, where each has its own weights."""
    if isinstance(projection, BucketProjection) and projection.weight.dim() == 3:
        return replace(projection, weight=projection.weight[where[0]])
    return projection


def _viewable(tensor: Tensor, view: MatrixView) -> bool:
    """Whether the tensor can be seen in its view without a copy."""
    try:
        tensor.view(view)
    except RuntimeError:
        return False
    return True


def maybe_compiled(function: Callable[..., Any], at: TensorStep, *also: Hashable) -> Callable[..., Any]:
    """The function, under ``torch.compile`` where the group asks for it and the tensor is worth a graph's launch."""
    if not at.is_compiled:
        return function
    return _compiled(function, at.view, at.device, *also)


@cache
def _compiled(function: Callable[..., Any], *_specialised: Hashable) -> Callable[..., Any]:
    """The function under ``torch.compile``, once for each view, device and what else it is specialised to.

    Dynamo compiles one code object at most 8 times, and this many tensors' shapes, ratios and decays would
    be more: each combination gets a code object of its own. A new step or learning rate compiles nothing.
    """
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(copy, fullgraph=True, dynamic=False)
