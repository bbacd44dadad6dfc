"""Adaptive projections: power iterations on the momentum learn the weights of the buckets."""

from collections.abc import Callable
from typing import Final

from torch import Tensor

from floragrad._streams import ADAPTIVE_NOISE, Stream
from floragrad.torch import update as pure
from floragrad.torch.context import StepContext
from floragrad.torch.part import Passes
from floragrad.torch.projection import BucketProjection, Projection, normalise_buckets, power_iteration

POWER_ITERATIONS: Final = 2
"""Power iterations of a step that learns the weights."""


def perturbed(weight: Tensor, noise: Tensor, width: int) -> Tensor:
    """Return the start of the power iterations: the old weights (..., n) plus noise, of norm 1 in each bucket."""
    return normalise_buckets(weight + noise, width, weight)


def power_iteration_step(
    grad: Tensor,
    scales: pure.Scales,
    momentum: Tensor,
    previous: Projection,
    learner: BucketProjection,
    beta1: float,
) -> Tensor:
    """Return Vᵀ(V w) in every bucket with V = β₁ decode(M) + (1 − β₁) U, summed over some rows.

    Args:
        grad: G, (..., rows, n).
        scales: Its factors.
        momentum: M of those rows, float32.
        previous: Decoder of M.
        learner: w.
        beta1: β₁.
    """
    old = previous.decode(momentum)
    return power_iteration(old * beta1 + pure.normalise(grad, scales) * (1 - beta1), learner)


def noise_from(words: Tensor, n: int, k: int) -> Tensor:
    """Return noise of norm about ``ADAPTIVE_NOISE`` in every bucket, uniform, float32 of (n,).

    Args:
        words: n words of the stream ``ADAPTIVE_NOISE``, int64.
        n: Columns.
        k: Buckets.
    """
    uniform = ((words >> 11) & (2**53 - 1)).double().mul_(2.0**-53).mul_(2).sub_(1)
    return uniform.mul_(ADAPTIVE_NOISE * (3 * k / n) ** 0.5).float()


def adaptive_noise(ctx: StepContext, words: Tensor | None = None) -> Tensor:
    """Return the noise of a step that learns the weights, on the parameter's device.

    Args:
        ctx: The step.
        words: n drawn words of its stream; None draws them.
    """
    assert ctx.plan.view is not None
    n = ctx.plan.view.columns
    if words is None:
        words = ctx.stream(Stream.ADAPTIVE_NOISE, ctx.resample_index).draw(n, ctx.device)
    return noise_from(words, n, ctx.plan.width)


def learn_weights(
    ctx: StepContext, weight: Tensor, power_products: Callable[[Tensor], Tensor], words: Tensor | None = None
) -> Passes:
    """Learn the weights of a projection on β₁ decode(M) + (1 − β₁) U, from the old ones plus a little noise.

    Args:
        ctx: The step.
        weight: The old weights, (batch, 1, n); the new ones are written into them.
        power_products: Returns Vᵀ(V w) of weights w, summed over the local rows.
        words: Drawn words of the noise; None draws them.

    Yields:
        The product, to be summed over all rows before the generator resumes.
    """
    learner = perturbed(weight, adaptive_noise(ctx, words), ctx.plan.width)
    for _ in range(POWER_ITERATIONS):
        product = power_products(learner)
        yield [ctx.shard_sum(product, ("rows",))]
        learner = normalise_buckets(product, ctx.plan.width, learner)
    weight.copy_(learner)
