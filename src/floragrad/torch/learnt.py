"""How the weights of ``"adaptive"`` projections are learnt: what each path starts and ends with."""

from typing import Final

import torch
from torch import Tensor

from floragrad._streams import ADAPTIVE_NOISE, Stream
from floragrad.torch.projection import normalise_buckets, philox
from floragrad.torch.tensor_step import TensorStep

POWER_ITERATIONS: Final = 2
"""How many are made when an epoch opens."""


def noisy(weight: Tensor, at: TensorStep) -> Tensor:
    """Where the power iterations start: the old weights, (..., n), plus a little noise, of norm 1 in each bucket."""
    noise = adaptive_noise(weight.shape[-1], at.plan.width, at.group["seed"], at.index, at.epoch)
    return normalise_buckets(weight + noise.to(weight.device), at.plan.width, weight)


def adaptive_noise(n: int, k: int, seed: int, index: int, epoch: int) -> Tensor:
    """Seeded noise of norm about ``ADAPTIVE_NOISE`` in every bucket, uniform, float32 of (n,) on the CPU."""
    words = philox(seed, index, epoch, Stream.ADAPTIVE_NOISE).random_raw(n)
    uniform = torch.from_numpy((words >> 11).astype("float64") * 2.0**-53).mul_(2).sub_(1)
    return uniform.mul_(ADAPTIVE_NOISE * (3 * k / n) ** 0.5).float()
