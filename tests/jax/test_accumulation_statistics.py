"""Over many windows the decoded gradient is the exact mean, with the variance that the formulas give.

Bounds are five standard errors of the mean over the draws: 6e-7 for one number, 1e-4 for all of a matrix. The
seeds are fixed, so a test that passes once passes always.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from floragrad.jax import compressed_multi_steps, sketch_accumulator
from tests.marks import slow

DRAWS = 2000
pytestmark = pytest.mark.usefixtures("unoptimized")
BOUND = 5.0
COLUMNS, ROWS = 20, 5
WINDOW = 3


@cache
def gradients() -> np.ndarray:
    """Kernels of (inputs, outputs): 20 columns of the method, 5 rows."""
    generator = np.random.default_rng(3)
    drawn = generator.standard_normal((WINDOW, COLUMNS, ROWS)) * generator.random((COLUMNS, 1))
    return drawn.astype(np.float32)


@cache
def draws(**options: Any) -> np.ndarray:
    """The decoded sum of every window."""

    def window(key: Any) -> Any:
        accumulator = sketch_accumulator(key, **options)
        carry = accumulator.init(jnp.asarray(gradients()[0]))
        for index, grad in enumerate(gradients()):
            carry = accumulator.update(carry, jnp.asarray(grad), index)
        return accumulator.finalize(carry)

    return np.asarray(jax.jit(jax.vmap(window))(jax.random.split(jax.random.key(0), DRAWS)), np.float64)


def assert_mean(samples: np.ndarray, expected: Any, variance: Any = None) -> None:
    """The mean of the samples is as expected; the variance of one sample is derived, or estimated."""
    spread = samples.var(0, ddof=1) if variance is None else variance
    error = np.abs(samples.mean(0) - expected)
    # Some of these are the same in every draw, but for float32's rounding.
    rounding = 1e-6 * np.abs(expected).max()
    assert (error <= BOUND * np.sqrt(spread / len(samples)) + rounding).all()


def sign_variance(exact: np.ndarray, ratio: int) -> np.ndarray:
    """Var Ĝⱼᵢ is the energy of the row's other columns in the bucket of j: in all (ρ − 1)‖G‖²."""
    buckets = -(-COLUMNS // ratio)
    variance = np.zeros_like(exact)
    for bucket in range(buckets):
        block = exact[bucket::buckets]
        variance[bucket::buckets] = np.square(block).sum(0) - np.square(block)
    if COLUMNS % buckets == 0:
        assert variance.sum() == pytest.approx((ratio - 1) * np.square(exact).sum())
    return variance


# With 10, 4 and 3 buckets, the last of two sizes.
@pytest.mark.parametrize("ratio", [slow(2), slow(5), 8])
def test_signs(ratio: int) -> None:
    exact = gradients().astype(np.float64).sum(0)
    found, variance = draws(ratio=ratio, state_dtype="float32"), sign_variance(exact, ratio)
    assert_mean(found, exact, variance)
    assert_mean(np.square(found - exact).sum((1, 2)), variance.sum())


def test_gaussian() -> None:
    """The error has ((n + 1)/k)‖G‖² of variance."""
    exact, width = gradients().astype(np.float64).sum(0), COLUMNS // 2
    found = draws(ratio=2, state_dtype="float32", projection="gaussian")
    variance = (np.square(exact).sum(0) + np.square(exact)) / width
    assert variance.sum() == pytest.approx((COLUMNS + 1) / width * np.square(exact).sum())
    assert_mean(found, exact, variance)
    assert_mean(np.square(found - exact).sum((1, 2)), variance.sum())


@pytest.mark.parametrize(
    ("state_dtype", "ratio"),
    [("int4", 1), slow("int8", 1), ("bfloat16", 1), slow("int4", 2)],
)
def test_few_bits(state_dtype: str, ratio: int) -> None:
    """Rounded after every micro-batch, the sum stays unbiased.

    At ρ = 1 each fold adds at most a quarter of the squared step to each number's variance, whose errors are
    uncorrelated with all that came before. A partial sum may exceed the true one by a step for each fold.
    """
    exact = gradients().astype(np.float64).sum(0)
    found = draws(ratio=ratio, state_dtype=state_dtype)
    assert_mean(found, exact)
    if ratio == 1:
        step = {"int4": 1 / 7, "int8": 1 / 127, "bfloat16": 2**-7}[state_dtype]
        partial = np.abs(np.cumsum(gradients().astype(np.float64), 0)).max((1, 2)) * (1 + step) ** WINDOW
        error = np.square(found - exact).sum((1, 2)).mean()
        assert 0 < error < np.square(step * partial).sum() / 4 * exact.size


def test_windows_of_multi_steps() -> None:
    """The last gradient is whole: the error is (ρ − 1)‖sum of the others‖², over windows of one optimizer."""
    optimizer = compressed_multi_steps(optax.sgd(-1.0), WINDOW, use_grad_mean=False, ratio=2, state_dtype="float32")

    def window(number: Any) -> Any:
        state = optimizer.init(jnp.asarray(gradients()[0]))._replace(gradient_step=number)
        for grad in gradients():
            updates, state = optimizer.update(jnp.asarray(grad), state)
        return updates

    found = np.asarray(jax.jit(jax.vmap(window))(jnp.arange(DRAWS)), np.float64)
    wide = gradients().astype(np.float64)
    variance = sign_variance(wide[:-1].sum(0), 2)
    assert_mean(found, wide.sum(0), variance)
    assert_mean(np.square(found - wide.sum(0)).sum((1, 2)), variance.sum())
