"""What one step of one tensor goes by: its plan, options and random streams, and the blocks it is visited in."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from floragrad._streams import Stream
from floragrad.policy import MatrixView, StateDtype, TensorPlan
from floragrad.torch.options import relative_lr
from floragrad.torch.part import Part
from floragrad.torch.philox import Philox
from floragrad.torch.projection import (
    Projection,
    draw_projection,
)
from floragrad.torch.quantize import RoundingBits
from floragrad.torch.storage import Block, StoredRows, row_blocks

BLOCK_ELEMENTS: Final = 2**20
"""Elements of a block of rows on the CPU: 4 MiB of float32; less would be launches, more would leave the cache."""
ACCELERATOR_BLOCK_ELEMENTS: Final = 2**24
"""The same elsewhere, where a launch costs more than a pass over memory."""
PIECES: Final = 3
"""Blocks that a tensor is cut into at least, so that what is as large as a block stays small beside it."""
WHOLE_ELEMENTS: Final = 2**14
"""A tensor of up to so many elements is one block: its temporaries take less than its launches."""

State = dict[str, Tensor]
Group = dict[str, Any]


def block_elements(elements: int, device: torch.device) -> int:
    """How many of a tensor's elements are worked on at a time: all of a small one's."""
    if elements <= WHOLE_ELEMENTS:
        return elements
    return min(most_elements(device), elements // PIECES)


def most_elements(device: torch.device) -> int:
    """The same of a large tensor."""
    return BLOCK_ELEMENTS if device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS


@dataclass(frozen=True)
class TensorStep:
    """One tensor at one step.

    Attributes:
        plan: What is kept for the tensor.
        group: The options of its parameter group.
        index: The number that the tensor's random streams are drawn with.
        step: t, from 1.
        device: Where the parameter is.
        part: What of the tensor is here.
    """

    plan: TensorPlan
    group: Group
    index: int
    step: int
    device: torch.device
    part: Part

    @property
    def epoch(self) -> int:
        """⌊t/κ⌋: projections are redrawn where it changes."""
        return int(self.step // self.group["kappa"])

    @property
    def opens_epoch(self) -> bool:
        """Whether the projection of this step differs from that of the step before."""
        return self.step % int(self.group["kappa"]) == 0

    @property
    def is_learnt(self) -> bool:
        """Whether the projection's weights are learnt, not drawn."""
        return self.plan.momentum == "sketch" and self.plan.projection == "adaptive"

    @property
    def learns(self) -> bool:
        """Whether they are learnt in this step: when an epoch opens, and in the first step."""
        return self.is_learnt and (self.opens_epoch or self.step == 1)

    @property
    def lr(self) -> float | Tensor:
        """The learning rate of this step, before the parameter's scale."""
        group = self.group
        if not group["relative_step"]:
            rate: float | Tensor = group["lr"]
            return rate
        return relative_lr(group, self.step)

    @property
    def step_lr(self) -> float | Tensor:
        """The same, a scalar on the parameter's device where it is a tensor."""
        lr = self.lr
        return lr.to(self.device, torch.float32).reshape(()) if isinstance(lr, Tensor) else lr

    @property
    def sign(self) -> float:
        """Of the step along D: all of it is odd in G, so with ``maximize`` M is kept as of G, and W goes up."""
        return -1.0 if self.group["maximize"] else 1.0

    @property
    def beta2(self) -> float:
        """β₂ = 1 − t^decay_rate."""
        return 1.0 - math.pow(float(self.step), self.group["decay_rate"])

    @property
    def view(self) -> MatrixView:
        """What is here as (batch, rows, columns)."""
        return self.part.view

    @property
    def splits_sketch(self) -> bool:
        """Whether a row's sketch is a sum over parts."""
        return self.plan.momentum == "sketch" and "columns" in self.part.split

    @property
    def _is_gaussian(self) -> bool:
        return self.plan.momentum == "sketch" and self.plan.projection == "gaussian"

    def blocks(self, *, rounds: bool = False) -> Iterator[Block]:
        """Batches and rows of the view, a block at a time; the whole of a small one.

        Args:
            rounds: Whether numbers of a block are rounded, which takes three buffers more: smaller blocks then.
        """
        total = self.view.numel
        elements = block_elements(total, self.device)
        if self.plan.view is None and elements < total:
            elements //= 2  # a word to round with for each number takes as much as half of the blocks
        if rounds and elements < total:
            elements //= 4
        return row_blocks(self.view, elements, gaussian=self._is_gaussian)

    def sketch_blocks(self) -> Iterator[Block]:
        """The same of the sketch, whose rows are shorter: more of them at a time."""
        if self._is_gaussian:
            return self.blocks()  # from one projection to the next a sketch is carried through all columns
        view = self.view._replace(columns=self.plan.width)
        # While a sketch moves there are up to three numbers for each of its own.
        elements = min(block_elements(self.view.numel, self.device), most_elements(self.device) * 3 // 8)
        return row_blocks(view, min(elements, view.numel))

    def room(self, *, rounds: bool = False) -> Tensor:
        """Room for a block in float32, one after the other."""
        matrices, rows = next(self.blocks(rounds=rounds), (slice(0, 0), slice(0, 0)))  # no later block is larger
        elements = matrices.stop * rows.stop * self.view.columns
        return torch.empty(elements, dtype=torch.float32, device=self.device)

    def rounding(self, stream: Stream, width: int, columns: slice) -> RoundingBits:
        """What to round the rows that are here with; nothing of it needs saving."""
        source = Philox(self.group["seed"], self.index, self.step, stream)
        return self.part.rounding(source, width, columns, self.device)

    def stored(self, state: State) -> StoredRows:
        """The momentum's buffers and what they are rounded with; a tensor without a view keeps its own in float32."""
        batch, rows, columns = self.view
        keys = [key for key in ("exp_avg", "exp_avg_scale") if key in state]
        dtype: StateDtype = self.plan.state_dtype if self.plan.view else "float32"
        # Sketches have all their columns wherever their rows are; whole momentum is where the parameter is.
        is_sketch = self.plan.momentum == "sketch"
        rounding = None
        if keys and dtype != "float32":
            here = slice(None) if is_sketch else self.part.columns
            rounding = self.rounding(Stream.STATE_ROUNDING, self.plan.width, here)
        buffers = tuple(state[key].view(batch, rows, -1 if rows * batch else state[key].shape[-1]) for key in keys)
        return StoredRows(buffers, self.plan.width if is_sketch else columns, dtype, rounding)

    def learnt_weight(self, state: State) -> Tensor:
        """The weights of a learnt projection, (batch, 1, n)."""
        return state["projection_weight"].view(self.view.batch, 1, self.view.columns)

    def parameter_rounding(self, dtype: torch.dtype) -> RoundingBits | None:
        """What to round a parameter of this dtype with; None where it is rounded to the nearest."""
        if dtype != torch.bfloat16 or not self.group["stochastic_rounding"]:
            return None
        width = self.plan.view.columns if self.plan.view else 1
        return self.rounding(Stream.PARAMETER_ROUNDING, width, self.part.columns)

    def projection(self, epoch: int) -> Projection:
        """The drawn projection of an epoch (signs or Gaussian)."""
        source = Philox(self.group["seed"], self.index, epoch, Stream.MOMENTUM)
        assert self.plan.view is not None
        here = self.part.columns if self.splits_sketch else None
        return draw_projection(self.plan.projection, self.plan.view, self.plan.width, source, self.device, here)


class TensorUpdate(NamedTuple):
    """A parameter that is to be updated, its gradient and state, and what its step goes by."""

    param: Tensor
    grad: Tensor
    state: State
    at: TensorStep
