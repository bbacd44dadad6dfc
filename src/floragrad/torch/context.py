"""Context of one step of one tensor: its plan, options, step and random streams."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from floragrad._streams import Stream
from floragrad.policy import MatrixView, StateDtype, TensorPlan
from floragrad.torch.options import relative_lr
from floragrad.torch.part import EVERYWHERE, Axis, Part, ShardSum
from floragrad.torch.projection import Projection, draw_projection
from floragrad.torch.random import Philox, Request, sign_count
from floragrad.torch.storage import RoundingBits, StoredRows

State = dict[str, Tensor]
Group = dict[str, Any]


@dataclass(frozen=True)
class StepContext:
    """Context of one tensor at one step.

    Attributes:
        plan: The policy's plan for the tensor.
        group: The options of its parameter group.
        tensor_id: Key of the tensor's random streams.
        step: t, from 1.
        device: The parameter's.
        part: The local part of the tensor.
    """

    plan: TensorPlan
    group: Group
    tensor_id: int
    step: int
    device: torch.device
    part: Part

    @property
    def resample_index(self) -> int:
        """Index ⌊t/κ⌋ of the projection."""
        return int(self.step // self.group["kappa"])

    @property
    def is_resample_step(self) -> bool:
        """True if the projection of this step differs from that of the previous step."""
        return self.step % int(self.group["kappa"]) == 0

    @property
    def is_sketched(self) -> bool:
        """True if the momentum is a sketch."""
        return self.plan.momentum == "sketch"

    @property
    def is_gaussian(self) -> bool:
        """True if the projection is Gaussian."""
        return self.is_sketched and self.plan.projection == "gaussian"

    @property
    def is_adaptive(self) -> bool:
        """True if the projection's weights are learned, not drawn."""
        return self.is_sketched and self.plan.projection == "adaptive"

    @property
    def learns_weights(self) -> bool:
        """True if this step learns the weights: on resample steps, and in the first one."""
        return self.is_adaptive and (self.is_resample_step or self.step == 1)

    @property
    def lr(self) -> float | Tensor:
        """Learning rate of this step, before the parameter's scale."""
        group = self.group
        if not group["relative_step"]:
            rate: float | Tensor = group["lr"]
            return rate
        return relative_lr(group, self.step)

    @property
    def step_lr(self) -> float | Tensor:
        """Learning rate of this step; a tensor becomes a scalar on the parameter's device."""
        lr = self.lr
        return lr.to(self.device, torch.float32).reshape(()) if isinstance(lr, Tensor) else lr

    @property
    def sign(self) -> float:
        """Sign of the step along D, −1 with ``maximize``: D is odd in G, so the state needs no sign."""
        return -1.0 if self.group["maximize"] else 1.0

    @property
    def beta2(self) -> float:
        """β₂ = 1 − t^decay_rate."""
        return 1.0 - math.pow(float(self.step), self.group["decay_rate"])

    @property
    def view(self) -> MatrixView:
        """Local part as (batch, rows, columns)."""
        return self.part.view

    @property
    def numel(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.plan.shape)

    @property
    def splits_sketch(self) -> bool:
        """True if a row's sketch is a sum over parts."""
        return self.is_sketched and "columns" in self.part.split

    @property
    def state_dtype(self) -> StateDtype:
        """Storage format of the momentum; float32 for tensors without a view."""
        return self.plan.state_dtype if self.plan.view else "float32"

    @property
    def sketch_columns(self) -> slice:
        """Local columns of the momentum; sketches have all of them."""
        return slice(None) if self.is_sketched else self.part.columns

    def rounds_state(self, state: State) -> bool:
        """Return whether the momentum is rounded when it is stored."""
        return "exp_avg" in state and self.state_dtype != "float32"

    def rounds_parameter(self, dtype: torch.dtype) -> bool:
        """Return whether a parameter of this dtype is rounded stochastically."""
        return dtype == torch.bfloat16 and bool(self.group["stochastic_rounding"])

    @property
    def parameter_width(self) -> int:
        """Number of a parameter row's elements with random words of their own."""
        return self.plan.view.columns if self.plan.view else 1

    def shard_sum(self, value: Tensor, axes: tuple[Axis, ...] = EVERYWHERE) -> ShardSum:
        """Return the local part's share of a sum over all parts of the tensor."""
        return ShardSum(value, axes, self.part, self.tensor_id)

    def stream(self, stream: Stream, counter: int | None = None) -> Philox:
        """Return one of the tensor's streams, of this step unless another counter is given."""
        return Philox(self.group["seed"], self.tensor_id, self.step if counter is None else counter, stream)

    def projection(self, resample_index: int, signs: Tensor | None = None) -> Projection:
        """Return the drawn projection (signs or Gaussian) of a resample index.

        Args:
            resample_index: ⌊t/κ⌋.
            signs: Drawn signs, float32 of (columns,); None draws them.
        """
        assert self.plan.view is not None
        local = self.part.columns if self.splits_sketch else None
        source = self.stream(Stream.MOMENTUM, resample_index)
        return draw_projection(self.plan.projection, self.plan.view, self.plan.width, source, self.device, local, signs)

    def stored(self, state: State, rounding: RoundingBits | None = None) -> StoredRows:
        """Return the momentum's buffers with their rounding words."""
        batch, rows, columns = self.view
        keys = [key for key in ("exp_avg", "exp_avg_scale") if key in state]
        buffers = tuple(state[key].view(batch, rows, -1 if rows * batch else state[key].shape[-1]) for key in keys)
        return StoredRows(buffers, self.plan.width if self.is_sketched else columns, self.state_dtype, rounding)

    def variances(self, state: State) -> list[Tensor]:
        """Return the buffers of a second moment of every element by rows; none where it is factored."""
        batch, rows, _ = self.view
        keys = [key for key in ("variance", "variance_scale") if key in state]
        return [state[key].view(batch, rows, -1 if rows * batch else state[key].shape[-1]) for key in keys]

    def adaptive_weight(self, state: State) -> Tensor:
        """Return the weights of an adaptive projection, (batch, 1, n)."""
        return state["projection_weight"].view(self.view.batch, 1, self.view.columns)


class ParamUpdate(NamedTuple):
    """Parameter to update with its gradient, its state, and the context of the step."""

    param: Tensor
    grad: Tensor
    state: State
    ctx: StepContext


def random_requests(update: ParamUpdate) -> dict[str, Request]:
    """Return the random words that a step of one tensor takes, by name."""
    ctx, part, found = update.ctx, update.ctx.part, {}
    if ctx.rounds_state(update.state):
        found["state"] = part.rounding_request(ctx.stream(Stream.STATE_ROUNDING), ctx.plan.width)
    if ctx.rounds_parameter(update.param.dtype):
        found["parameter"] = part.rounding_request(ctx.stream(Stream.PARAMETER_ROUNDING), ctx.parameter_width)
    if "variance_scale" in update.state:
        assert ctx.plan.view is not None
        found["variance"] = part.rounding_request(ctx.stream(Stream.VARIANCE_ROUNDING), ctx.plan.view.columns)
    if not ctx.is_sketched or ctx.plan.view is None:
        return found
    columns = ctx.plan.view.columns
    if ctx.plan.projection == "sign":
        found["signs"] = Request(ctx.stream(Stream.MOMENTUM, ctx.resample_index), sign_count(columns))
        if ctx.is_resample_step:
            found["old signs"] = Request(ctx.stream(Stream.MOMENTUM, ctx.resample_index - 1), sign_count(columns))
    if ctx.learns_weights:
        found["noise"] = Request(ctx.stream(Stream.ADAPTIVE_NOISE, ctx.resample_index), columns)
    return found
