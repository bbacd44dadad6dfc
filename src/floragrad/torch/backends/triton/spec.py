"""Description of a batch in plain values: compile-time (:class:`Spec`) and runtime (:class:`StepScalars`)."""

from dataclasses import dataclass
from typing import Final

import torch
import triton.language as tl

from floragrad.policy import Momentum, StateDtype

DTYPES: Final = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
STATE_DTYPES: Final[dict[StateDtype, int]] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
MOMENTA: Final[dict[Momentum, int]] = {"none": 0, "whole": 1, "sketch": 2}


@dataclass(frozen=True)
class Spec:
    """Compile-time description of a step of tensors of one shape, with one set of options.

    Attributes:
        batch: Matrices of a tensor; 1 for a tensor without a matrix view, which is one row of all its elements.
        rows: Of each matrix, on this device.
        columns: Of a row.
        width: Columns of the momentum.
        all_rows: Rows of each matrix, on all devices.
        numel: Elements of the tensor, on all devices.
        param_dtype: Of the parameter.
        grad_dtype: Of the gradient.
        state_dtype: Storage format of the momentum.
        momentum: Kind of momentum: a sketch, whole or none.
        factored: True for a factored second moment.
        adaptive: True if the projection's weights are learned, not drawn.
        learns: True if this step learns them.
        residual: True for the residual estimator.
        resamples: True if the projection differs from that of the previous step.
        rounds: True if a bfloat16 parameter is rounded stochastically.
        scales: True if the step is in units of rms(W).
        is_split: True if other devices have other rows or matrices of the tensors.
        aligned: True if all addresses are multiples of 16 bytes.
    """

    batch: int
    rows: int
    columns: int
    width: int
    all_rows: int
    numel: int
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    state_dtype: StateDtype
    momentum: Momentum
    factored: bool
    adaptive: bool
    learns: bool
    residual: bool
    resamples: bool
    rounds: bool
    scales: bool
    is_split: bool
    aligned: bool

    @property
    def is_sketch(self) -> bool:
        """True if there is a projection."""
        return self.momentum == "sketch"

    @property
    def rounds_state(self) -> bool:
        """True if the momentum is rounded stochastically."""
        return self.momentum != "none" and self.state_dtype != "float32"

    @property
    def is_signed(self) -> bool:
        """True if the columns' factors include the projection's signs."""
        return self.is_sketch and self.factored and not self.adaptive and not self.resamples

    @property
    def draws_signs(self) -> bool:
        """True if signs are drawn into the workspace instead."""
        return self.is_sketch and not self.adaptive and not self.is_signed

    @property
    def draws(self) -> bool:
        """True if random words or signs are drawn into the workspace."""
        return self.rounds_state or self.rounds or self.draws_signs


@dataclass(frozen=True)
class StepScalars:
    """Scalar arguments of the kernels; other values need no compilation.

    Attributes:
        beta1: β₁; 0 without momentum.
        beta2: β₂ of this step.
        eps: ε₁.
        least: ε₂.
        lr: The learning rate; a tensor is read on its device.
        sign: -1 with ``maximize``.
        decay: Weight decay.
        clip_threshold: Of rms(D).
    """

    beta1: float
    beta2: float
    eps: float
    least: float
    lr: float | torch.Tensor
    sign: float
    decay: float
    clip_threshold: float
