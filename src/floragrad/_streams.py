"""Random streams of a tensor, shared by both frameworks."""

from enum import IntEnum
from typing import Final

ADAPTIVE_NOISE: Final = 0.1
"""Norm of the seeded noise, relative to the weights', that lets adaptive buckets leave a saddle."""


class Stream(IntEnum):
    """Independent random streams of one tensor."""

    MOMENTUM = 0
    ACCUMULATOR = 1
    STATE_ROUNDING = 2
    PARAMETER_ROUNDING = 3
    ADAPTIVE_NOISE = 4
    ACCUMULATOR_ROUNDING = 5
    EXCHANGE_ROUNDING = 6
    CONVERSION_ROUNDING = 7
    VARIANCE_ROUNDING = 8
