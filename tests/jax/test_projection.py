"""Projections without a matrix equal products with one; signs are unbiased, and every stream is its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from floragrad import reference
from floragrad._streams import Stream
from floragrad.jax.projection import (
    BucketProjection,
    adaptive_noise,
    adaptive_weights,
    draw,
    normalise_buckets,
    stream_key,
)
from tests.marks import paired

SIZES = [(12, 4), (37, 8), (10, 2), (9, 1), (7, 7)]  # whole slots, a short last one, one bucket, a bucket each
UNIT = 2.0**-24
pytestmark = pytest.mark.usefixtures("unoptimized")
AXES = (-2, -1)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def laid(matrices: Any, axis: int) -> jax.Array:
    """(..., n, m) as it is, or as (..., m, n)."""
    return jnp.asarray(matrices if axis == -2 else np.swapaxes(matrices, -1, -2))


def assert_close(found: jax.Array, expected: np.ndarray, axis: int) -> None:
    """Sums of at most 37 · 37 products in float32: 2⁻²⁴ for each, of the largest number, and a wide margin."""
    back = np.asarray(found if axis == -2 else jnp.swapaxes(found, -1, -2))
    assert back.shape == expected.shape
    assert np.abs(back - expected).max() <= 200 * UNIT * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(("kind", "size", "axis"), paired(("sign", "gaussian"), SIZES, AXES))
def test_equals_products_with_its_matrix(kind: Any, size: tuple[int, int], axis: int) -> None:
    n, k = size

    @jax.jit  # one program; operation by operation, each would be compiled for every shape
    def products(x: Any, z: Any) -> Any:
        now, before = (draw(kind, jax.random.key(seed), n, k) for seed in (0, 1))
        carried, kept = (now.transfer(z, before, changed, orthogonal=False, axis=axis) for changed in (True, False))
        return now.matrix(), before.matrix(), now.encode(x, axis=axis), now.decode(z, axis=axis), carried, kept

    x, z = normal(3, n, 5), normal(3, k, 5)
    *matrices, encoded, decoded, carried, kept = products(laid(x, axis), laid(z, axis))
    p, q = (np.asarray(each, np.float64) for each in matrices)
    assert_close(encoded, p @ x, axis)
    assert_close(decoded, p.T @ z, axis)
    assert_close(carried, p @ (q.T @ z), axis)
    assert np.array_equal(kept, laid(z, axis))


@pytest.mark.parametrize(("size", "axis"), paired(SIZES, AXES))
def test_buckets_decode_orthogonally(size: tuple[int, int], axis: int) -> None:
    """(P Pᵀ)⁻¹ of unequal buckets too; P is the oracle's."""
    n, k = size

    @jax.jit
    def products(z: Any) -> Any:
        now, before = (draw("sign", jax.random.key(seed), n, k) for seed in (0, 1))
        carried = now.transfer(z, before, True, orthogonal=True, axis=axis)
        return now.weight, before.weight, now.matrix(), now.decode_orthogonal(z, axis=axis), carried

    z = normal(2, k, 5)
    *weights, matrix, decoded, carried = products(laid(z, axis))
    p, q = (reference.bucket_projection(np.asarray(each, np.float64), k) for each in weights)
    assert np.array_equal(matrix, p)
    assert_close(decoded, p.T @ np.linalg.inv(p @ p.T) @ z, axis)
    assert_close(carried, p @ q.T @ np.linalg.inv(q @ q.T) @ z, axis)


def test_gaussian_rows_have_no_orthogonal_decoding() -> None:
    projection = draw("gaussian", jax.random.key(0), 8, 2)
    with pytest.raises(NotImplementedError, match="not orthogonal"):
        projection.decode_orthogonal(jnp.ones((2, 3)))
    with pytest.raises(NotImplementedError, match="not orthogonal"):
        projection.transfer(jnp.ones((2, 3)), projection, True, orthogonal=True)


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
def test_decoding_is_unbiased(kind: Any) -> None:
    """E[PᵀP] = I: over N draws each entry is within 6 of its standard errors.

    An entry of PᵀP is 1 on the diagonal for signs, and else has a variance of at most 1 (signs that share a bucket)
    or 2/k (Gaussian); the bound is 6 √(max(1, 2/k) / N), passed by chance in 2·10⁻⁹ of entries.
    """
    n, k, count = 12, 4, 4000
    keys = jax.random.split(jax.random.key(7), count)
    squares = jax.jit(jax.vmap(lambda key: (lambda p: p.T @ p)(draw(kind, key, n, k).matrix())))(keys)
    assert np.abs(np.asarray(squares.mean(0)) - np.eye(n)).max() < 6 * (1 / count) ** 0.5


def test_streams_tensors_epochs_and_seeds_are_keys_of_their_own() -> None:
    keys = [
        tuple(jax.random.key_data(stream_key(seed, index, counter, stream)).tolist())
        for seed in (0, 1, 2**32 - 1)
        for index in (0, 1, 2)
        for counter in (0, 1, 7)
        for stream in Stream
    ]
    assert len(set(keys)) == len(keys) == 3 * 3 * 3 * len(Stream)


@pytest.mark.parametrize(("size", "axis"), paired(SIZES, AXES))
def test_what_is_learnt_is_the_oracles(size: tuple[int, int], axis: int) -> None:
    n, k = size

    @jax.jit
    def learning(matrix: Any, weight: Any) -> Any:
        key, start = jax.random.key(3), normalise_buckets(weight, k, jnp.ones((2, n)))
        return start, adaptive_weights(matrix, start, k, key, axis=axis), adaptive_noise(key, n, k)

    matrix = normal(2, n, 7)
    start, found, noise = learning(laid(matrix, axis), normal(2, n))
    noise = np.asarray(noise, np.float64)
    for learnt, block, weight in zip(found, matrix, start, strict=True):
        oracle = reference.adaptive_weights(block.T.astype(np.float64), np.asarray(weight, np.float64) + noise, k)
        np.testing.assert_allclose(learnt, oracle, atol=1e-4)


def test_a_bucket_of_zeros_keeps_its_weights() -> None:
    start = normalise_buckets(jnp.ones(8), 2, jnp.ones(8))
    half = jnp.ones((8, 3)).at[1::2].set(0.0)
    learnt = adaptive_weights(half, start, 2, jax.random.key(0))
    noisy = normalise_buckets(start + adaptive_noise(jax.random.key(0), 8, 2), 2, start)
    assert np.array_equal(learnt[1::2], noisy[1::2])
    norms = jnp.sqrt(BucketProjection.from_unit_weight(learnt, 2).encode(learnt[:, None])[:, 0])
    np.testing.assert_allclose(norms, 1.0, rtol=1e-6)
