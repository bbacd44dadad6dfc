"""What the tensors of one batch have in common, in plain values: all that decides how kernels are compiled."""

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
    """A step of tensors of one shape, with one set of options.

    Attributes:
        batch: Matrices of a tensor; 1 for a tensor without a matrix view, which is one row of all its elements.
        rows: Of each matrix, on this device.
        columns: Of a row.
        width: Columns of the momentum.
        all_rows: Rows of each matrix, on all devices.
        numel: Elements of the tensor, on all devices.
        param_dtype: Of the parameter.
        grad_dtype: Of the gradient.
        state_dtype: How the momentum is stored.
        momentum: Whether it is a sketch, whole or none.
        factored: Whether the second moment is.
        adaptive: Whether the projection's weights are learnt, not drawn.
        learns: Whether they are in this step.
        residual: Which estimator.
        resamples: Whether the projection differs from that of the step before.
        rounds: Whether a bfloat16 parameter is rounded stochastically.
        scales: Whether the step is in units of rms(W).
        is_split: Whether other devices have other rows or matrices of the tensors.
        aligned: Whether all addresses are multiples of 16 bytes.
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
        """Whether there is a projection."""
        return self.momentum == "sketch"

    @property
    def rounds_state(self) -> bool:
        """Whether the momentum is rounded stochastically."""
        return self.momentum != "none" and self.state_dtype != "float32"

    @property
    def is_signed(self) -> bool:
        """Whether the projection's signs are part of the columns' factors."""
        return self.is_sketch and self.factored and not self.adaptive and not self.resamples

    @property
    def draws_signs(self) -> bool:
        """Whether signs are drawn into the workspace instead."""
        return self.is_sketch and not self.adaptive and not self.is_signed

    @property
    def draws(self) -> bool:
        """Whether anything is drawn but signs that are part of factors."""
        return self.rounds_state or self.rounds or self.draws_signs


@dataclass(frozen=True)
class StepScalars:
    """What the kernels are given as numbers: another value compiles nothing.

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
