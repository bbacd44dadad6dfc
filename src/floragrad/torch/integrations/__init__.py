"""Compressed gradient accumulation inside other people's training loops; each module needs its library alone."""

from typing import TypedDict

import torch

from floragrad.policy import Projection, StateDtype

__all__ = ["AccumulationOptions"]


class AccumulationOptions(TypedDict, total=False):
    """What a loop may choose of :class:`floragrad.GradientAccumulator`; what is left out is as there."""

    ratio: int
    rank: int | None
    state_dtype: StateDtype | torch.dtype
    projection: Projection
    seed: int
    release: bool | None
