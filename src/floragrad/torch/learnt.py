"""How the weights of ``"adaptive"`` projections are learnt: what each path starts and ends with."""

from typing import Final

import torch
from torch import Tensor

from floragrad._streams import ADAPTIVE_NOISE, Stream
from floragrad.policy import StateDtype
from floragrad.torch import update as pure
from floragrad.torch.philox import Philox
from floragrad.torch.projection import BucketProjection, Projection, normalise_buckets, power_iteration
from floragrad.torch.storage import load
from floragrad.torch.tensor_step import TensorStep

POWER_ITERATIONS: Final = 2
"""How many are made when an epoch opens."""


def noisy(weight: Tensor, at: TensorStep) -> Tensor:
    """Where the power iterations start: the old weights, (..., n), plus a little noise, of norm 1 in each bucket."""
    noise = adaptive_noise(weight.shape[-1], at.plan.width, at.group["seed"], at.index, at.epoch)
    return normalise_buckets(weight + noise.to(weight.device), at.plan.width, weight)


def grown(
    grad: Tensor,
    scales: pure.Scales,
    kept: tuple[Tensor, ...],
    dtype: StateDtype,
    previous: Projection,
    learner: BucketProjection,
    beta1: float,
) -> Tensor:
    """Vᵀ(V w) in every bucket with V = β₁ decode(M) + (1 − β₁) U, of some rows: one power iteration on w.

    Args:
        grad: G, (..., rows, n).
        scales: What makes U of it.
        kept: The momentum of those rows, as it is stored.
        dtype: How.
        previous: What it is decoded with.
        learner: w.
        beta1: β₁.
    """
    old = previous.decode(load(kept, dtype, learner.gram.shape[-1]))
    return power_iteration(old * beta1 + pure.normalise(grad, scales) * (1 - beta1), learner)


def adaptive_noise(n: int, k: int, seed: int, index: int, epoch: int) -> Tensor:
    """Seeded noise of norm about ``ADAPTIVE_NOISE`` in every bucket, uniform, float32 of (n,) on the CPU."""
    words = Philox(seed, index, epoch, Stream.ADAPTIVE_NOISE).words(n)
    uniform = torch.from_numpy((words >> 11).astype("float64") * 2.0**-53).mul_(2).sub_(1)
    return uniform.mul_(ADAPTIVE_NOISE * (3 * k / n) ** 0.5).float()
