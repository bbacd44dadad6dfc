"""Projections of columns: encode n as k, decode k as n, transfer a sketch from one projection to the next.

All functions take matrices in JAX's layout, (..., n, m) like a kernel (in, out): the method's n columns, the inputs,
are the LAST BUT ONE axis, and its m rows, the outputs, the last. ``axis=-1`` is for matrices of (..., m, n), like
embeddings (vocabulary, features); sketches have the layout of their matrices. Rows never mix, so a shard of outputs is
projected without communication.

A projection is a pytree of arrays, passed as an argument; only :func:`draw` and :func:`stream_key` take seeds or keys.
"""

from functools import reduce
from math import ceil
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from floragrad._streams import ADAPTIVE_NOISE, Stream
from floragrad.jax import random
from floragrad.jax.blocks import split_blocks, zero_pad
from floragrad.policy import Projection as ProjectionKind


class BucketProjection(NamedTuple):
    """Sparse P with P[bucket(j), j] = weight[j], bucket(j) = j mod k.

    With random signs as weights this is a balanced count sketch: P Pᵀ is the diagonal of bucket sizes. With weights of
    norm 1 in each bucket the rows of P are orthonormal. No dense matrix is built and no matrix product is taken.

    Attributes:
        weight: (n,), or (..., n) with weights for each matrix of a stack, float32.
        gram: Diagonal of P Pᵀ, (k,), float32: bucket sizes for signs, ones for weights of norm 1.
    """

    weight: Array
    gram: Array

    @classmethod
    def from_signs(cls, signs: Array, k: int) -> "BucketProjection":
        """Build P from random signs, (n,): E[PᵀP] = I, and P Pᵀ is the diagonal of bucket sizes."""
        return cls(signs, bucket_sizes(signs.shape[-1], k))

    @classmethod
    def from_unit_weight(cls, weight: Array, k: int) -> "BucketProjection":
        """Build P from weights with norm 1 in each bucket, (..., n): orthonormal rows."""
        return cls(weight, jnp.ones(k, jnp.float32))

    def encode(self, matrix: Array, *, axis: int = -2) -> Array:
        """Return P X: (..., n, m) to (..., k, m)."""
        signed, n, k = (
            matrix * _broadcast_to_axis(self.weight, axis, matrix.ndim),
            self.weight.shape[-1],
            self.gram.shape[-1],
        )
        where = signed.ndim + axis
        # Add one by one: XLA's sum over the outer axis of (groups, k, m) is forty times slower on a CPU.
        parts = [lax.slice_in_dim(signed, start, min(start + k, n), axis=where) for start in range(0, n, k)]
        return reduce(jnp.add, [zero_pad(part, k, axis=where) for part in parts])

    def decode(self, sketch: Array, *, axis: int = -2) -> Array:
        """Return Pᵀ Z: (..., k, m) to (..., n, m)."""
        return tile(sketch, self.weight.shape[-1], axis=axis) * _broadcast_to_axis(self.weight, axis, sketch.ndim)

    def decode_orthogonal(self, sketch: Array, *, axis: int = -2) -> Array:
        """Return Pᵀ (P Pᵀ)⁻¹ Z: after encoding, the orthogonal projection onto the rows of P."""
        return self.decode(sketch / _broadcast_to_axis(self.gram, axis, sketch.ndim), axis=axis)

    def transfer(
        self, sketch: Array, previous: "Projection", resampled: ArrayLike, *, orthogonal: bool, axis: int = -2
    ) -> Array:
        """Decode Z with the previous projection and encode it with this one.

        Args:
            sketch: Z, (..., k, m).
            previous: Projection that Z is encoded with, of the same kind.
            resampled: True where the two differ; otherwise Z is returned unchanged. May be traced.
            orthogonal: Decode with (P Pᵀ)⁻¹.
            axis: Axis of the buckets; default -2.
        """
        # P_new P_oldᵀ is diagonal: the buckets of both are the same.
        assert isinstance(previous, BucketProjection)
        overlap = split_blocks(self.weight * previous.weight, self.gram.shape[-1], axis=-1).sum(-2)
        factor = overlap / jnp.broadcast_to(previous.gram, overlap.shape) if orthogonal else overlap
        return sketch * _broadcast_to_axis(jnp.where(resampled, factor, 1.0), axis, sketch.ndim)

    def matrix(self) -> Array:
        """Return P as a dense matrix, (..., k, n), float32, for tests."""
        n, k = self.weight.shape[-1], self.gram.shape[-1]
        buckets = jax.nn.one_hot(jnp.arange(n, dtype=jnp.int32) % k, k, axis=0, dtype=jnp.float32)
        return buckets * self.weight[..., None, :]


class GaussianProjection(NamedTuple):
    """Dense P with independent elements N(0, 1/k), the paper's projection.

    Attributes:
        dense: P, (k, n), float32.
    """

    dense: Array

    @classmethod
    def draw(cls, key: Array, n: int, k: int) -> "GaussianProjection":
        """Draw P for n columns and k buckets."""
        return cls(random.normal(key, (k, n)) * k**-0.5)

    def encode(self, matrix: Array, *, axis: int = -2) -> Array:
        """Return P X."""
        return _matmul(self.dense, matrix, axis)

    def decode(self, sketch: Array, *, axis: int = -2) -> Array:
        """Return Pᵀ Z."""
        return _matmul(self.dense.T, sketch, axis)

    def decode_orthogonal(self, sketch: Array, *, axis: int = -2) -> Array:
        """Refuse to decode: Gaussian rows are not orthogonal."""
        raise NotImplementedError("Gaussian rows are not orthogonal: residual=True is refused with them")

    def transfer(
        self, sketch: Array, previous: "Projection", resampled: ArrayLike, *, orthogonal: bool, axis: int = -2
    ) -> Array:
        """Decode Z with the previous projection and encode it with this one."""
        if orthogonal:
            raise NotImplementedError("Gaussian rows are not orthogonal: residual=True is refused with them")
        transferred: Array = lax.cond(
            resampled, lambda: self.encode(previous.decode(sketch, axis=axis), axis=axis), lambda: sketch
        )
        return transferred

    def matrix(self) -> Array:
        """Return P."""
        return self.dense


Projection: TypeAlias = BucketProjection | GaussianProjection
"""P, k x n, with E[PᵀP] = I or orthonormal rows."""


def stream_key(seed: ArrayLike, index: ArrayLike, counter: ArrayLike, stream: ArrayLike) -> Array:
    """Return the key of one leaf's random stream at one resample or step; the same under ``jit`` and on any devices.

    Args:
        seed: Seed of the optimizer, 0 to 2**32 - 1.
        index: Index of the leaf: its position among the leaves at ``init``.
        counter: Resample index for projections, step for rounding.
        stream: Stream of the leaf, a :class:`Stream`.

    Example:
        >>> one, other = (stream_key(0, 0, resample_index, Stream.MOMENTUM) for resample_index in (0, 1))
        >>> bool((jax.random.key_data(one) == jax.random.key_data(other)).all())
        False
    """
    # Stream and leaf in one word, 3 and 29 bits: each fold is code to compile for each leaf.
    return random.fold_in(random.fold_in(random.key_from_seed(seed), len(Stream) * index + stream), counter)


def draw(kind: ProjectionKind, key: Array, n: int, k: int) -> Projection:
    """Draw a random projection of n columns to k.

    Args:
        kind: ``"gaussian"``, or any other for signs.
        key: Key of :func:`stream_key`.
        n: Columns of a matrix.
        k: Columns of a sketch.

    Example:
        >>> projection = draw("sign", jax.random.key(0), 6, 2)
        >>> projection.encode(projection.decode_orthogonal(jnp.ones((2, 5)))).tolist() == [[1.0] * 5] * 2
        True
    """
    if kind == "gaussian":
        return GaussianProjection.draw(key, n, k)
    return BucketProjection.from_signs(random.signs(random.words(key, (n,))), k)


def _broadcast_to_axis(vector: Array, axis: int, ndim: int) -> Array:
    """Expand one factor for each column, (..., n), to ``ndim`` dimensions with the columns along ``axis``."""
    factor = jnp.expand_dims(vector, -3 - axis)
    return jnp.expand_dims(factor, range(ndim - factor.ndim))


def _matmul(dense: Array, matrix: Array, axis: int) -> Array:
    """Multiply by a dense matrix along ``axis``, in full float32."""
    if axis == -2:
        return jnp.matmul(dense, matrix, precision=lax.Precision.HIGHEST)
    return jnp.matmul(matrix, dense.T, precision=lax.Precision.HIGHEST)


def bucket_sizes(n: int, k: int) -> Array:
    """Return the number of columns in each of k buckets, bucket(j) = j mod k; (k,), float32."""
    larger = jnp.arange(k, dtype=jnp.int32) < n % k
    return jnp.where(larger, jnp.float32(n // k + 1), jnp.float32(n // k))


def tile(values: Array, n: int, *, axis: int) -> Array:
    """Repeat (..., k, ...) along an axis, counted from the end, up to a length of n."""
    where, k = values.ndim + axis, values.shape[axis]
    count = ceil(n / k)
    repeated = jnp.broadcast_to(
        jnp.expand_dims(values, where), (*values.shape[:where], count, *values.shape[where:])
    ).reshape(*values.shape[:where], count * k, *values.shape[where + 1 :])
    return lax.slice_in_dim(repeated, 0, n, axis=where)


def normalise_buckets(weight: Array, k: int, fallback: Array) -> Array:
    """Normalise ``weight``, (..., n), in each of k buckets; buckets of zeros are replaced by ``fallback``."""
    norm = tile(jnp.sqrt(jnp.square(split_blocks(weight, k, axis=-1)).sum(-2)), weight.shape[-1], axis=-1)
    return jnp.where(norm == 0, fallback, weight / jnp.where(norm == 0, 1.0, norm))


def adaptive_noise(key: Array, n: int, k: int) -> Array:
    """Draw uniform noise with a norm of about ``ADAPTIVE_NOISE`` in each bucket, (n,), float32."""
    scale = float(ADAPTIVE_NOISE * (3 * k / n) ** 0.5)
    return random.uniform(key, (n,), scale)


def adaptive_weights(matrix: Array, start: Array, k: int, key: Array, *, axis: int = -2) -> Array:
    """Return weights after two power iterations in each bucket, w ← Vᵀ(V w) / ‖Vᵀ(V w)‖, from ``start`` plus noise.

    V holds the bucket's columns of ``matrix``; the limit is its first right singular vector, the best projection of the
    bucket to one element for each row. A bucket of zeros keeps its weights.

    Args:
        matrix: (..., n, m), float32.
        start: Weights before, (..., n), float32, with norm 1 in each bucket.
        k: Number of buckets.
        key: Key of the noise.
        axis: Axis of the columns; default -2.
    """
    n = start.shape[-1]
    noise = jnp.broadcast_to(adaptive_noise(key, n, k), start.shape)
    weight = normalise_buckets(start + noise, k, start)
    for _ in range(2):
        sketch = BucketProjection.from_unit_weight(weight, k).encode(matrix, axis=axis)
        weight = normalise_buckets((matrix * tile(sketch, n, axis=axis)).sum(-3 - axis), k, weight)
    return weight
