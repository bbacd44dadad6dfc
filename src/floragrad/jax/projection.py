"""Projections of columns: encode n of them as k, decode k as n, carry a sketch from one projection to the next.

Everything acts on matrices as JAX keeps them, (..., n, m) like a kernel (in, out): the method's n columns, the
inputs, lie along the LAST BUT ONE axis, and its m rows, the outputs, along the last. ``axis=-1`` is for
matrices that are kept as (..., m, n), like embeddings (vocabulary, features); sketches lie as their matrices
do. Rows never mix, so a shard of outputs is projected by itself.

A projection is a pytree of arrays and the first argument of what is computed with it; only :func:`draw` and
:func:`stream_key` know of seeds.
"""

from functools import reduce
from math import ceil
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from floragrad._streams import ADAPTIVE_NOISE, Stream
from floragrad.jax import random
from floragrad.policy import Projection as ProjectionKind


class Projection(Protocol):
    """P, k x n, with E[PᵀP] = I or orthonormal rows."""

    def encode(self, matrix: Array, *, axis: int = -2) -> Array:
        """P X: (..., n, m) to (..., k, m)."""
        ...

    def decode(self, sketch: Array, *, axis: int = -2) -> Array:
        """Pᵀ Z: (..., k, m) to (..., n, m)."""
        ...

    def decode_orthogonal(self, sketch: Array, *, axis: int = -2) -> Array:
        """Pᵀ (P Pᵀ)⁻¹ Z: after encoding, the orthogonal projection onto the rows of P."""
        ...

    def carry(
        self, sketch: Array, previous: "Projection", changed: ArrayLike, *, orthogonal: bool, axis: int = -2
    ) -> Array:
        """Z, written under ``previous``, as this projection would have written it.

        Args:
            sketch: Z.
            previous: The projection that Z was written under, of the same kind.
            changed: Whether the two differ at all; where they do not, Z is returned as it is.
            orthogonal: Decode with (P Pᵀ)⁻¹.
            axis: Of the buckets.
        """
        ...

    def matrix(self) -> Array:
        """P as a dense float32 matrix, (..., k, n), for tests and for looking at."""
        ...


class BucketProjection(NamedTuple):
    """Columns dealt into k buckets, bucket(j) = j mod k; P[bucket(j), j] = weight[j].

    With random signs for weights this is a balanced count sketch: P Pᵀ is the diagonal of bucket sizes. With
    learnt weights of norm 1 in each bucket the rows of P are orthonormal. No matrix is built, no product taken.

    Attributes:
        weight: (n,), or (..., n) where every matrix of a stack has its own.
        gram: The diagonal of P Pᵀ, (k,): bucket sizes for signs, ones for weights of norm 1.
    """

    weight: Array
    gram: Array

    @classmethod
    def signs(cls, signs: Array, k: int) -> "BucketProjection":
        """Of +1 and -1: E[PᵀP] = I, P Pᵀ the bucket sizes."""
        return cls(signs, bucket_sizes(signs.shape[-1], k))

    @classmethod
    def normalised(cls, weight: Array, k: int) -> "BucketProjection":
        """Of weights with norm 1 in each bucket: orthonormal rows."""
        return cls(weight, jnp.ones(k, jnp.float32))

    def encode(self, matrix: Array, *, axis: int = -2) -> Array:
        """P X."""
        signed, n, k = matrix * _along(self.weight, axis, matrix.ndim), self.weight.shape[-1], self.gram.shape[-1]
        where = signed.ndim + axis
        # Addends one by one: XLA's sum over the outer axis of (slots, k, m) is forty times slower on a CPU.
        parts = [lax.slice_in_dim(signed, at, min(at + k, n), axis=where) for at in range(0, n, k)]
        return reduce(jnp.add, [_filled(part, k, where) for part in parts])

    def decode(self, sketch: Array, *, axis: int = -2) -> Array:
        """Pᵀ Z."""
        return tile(sketch, self.weight.shape[-1], axis=axis) * _along(self.weight, axis, sketch.ndim)

    def decode_orthogonal(self, sketch: Array, *, axis: int = -2) -> Array:
        """Pᵀ (P Pᵀ)⁻¹ Z."""
        return self.decode(sketch / _along(self.gram, axis, sketch.ndim), axis=axis)

    def carry(
        self, sketch: Array, previous: Projection, changed: ArrayLike, *, orthogonal: bool, axis: int = -2
    ) -> Array:
        """Z as this projection would have written it."""
        # P_new P_oldᵀ is diagonal: both deal the columns into the same buckets.
        assert isinstance(previous, BucketProjection)
        overlap = slots(self.weight * previous.weight, self.gram.shape[-1], axis=-1).sum(-2)
        factor = overlap / jnp.broadcast_to(previous.gram, overlap.shape) if orthogonal else overlap
        return sketch * _along(jnp.where(changed, factor, 1.0), axis, sketch.ndim)

    def matrix(self) -> Array:
        """P, dense."""
        n, k = self.weight.shape[-1], self.gram.shape[-1]
        buckets = jax.nn.one_hot(jnp.arange(n, dtype=jnp.int32) % k, k, axis=0, dtype=jnp.float32)
        return buckets * self.weight[..., None, :]


class GaussianProjection(NamedTuple):
    """The paper's P ~ N(0, 1/k).

    Attributes:
        dense: P, (k, n).
    """

    dense: Array

    @classmethod
    def drawn(cls, key: Array, n: int, k: int) -> "GaussianProjection":
        """Of n columns to k."""
        return cls(random.normal(key, (k, n)) * k**-0.5)

    def encode(self, matrix: Array, *, axis: int = -2) -> Array:
        """P X."""
        return _product(self.dense, matrix, axis)

    def decode(self, sketch: Array, *, axis: int = -2) -> Array:
        """Pᵀ Z."""
        return _product(self.dense.T, sketch, axis)

    def decode_orthogonal(self, sketch: Array, *, axis: int = -2) -> Array:
        """Refused: Gaussian rows are not orthogonal."""
        raise NotImplementedError("Gaussian rows are not orthogonal: residual=True is refused with them")

    def carry(
        self, sketch: Array, previous: Projection, changed: ArrayLike, *, orthogonal: bool, axis: int = -2
    ) -> Array:
        """Z as this projection would have written it."""
        if orthogonal:
            raise NotImplementedError("Gaussian rows are not orthogonal: residual=True is refused with them")
        carried: Array = lax.cond(
            changed, lambda: self.encode(previous.decode(sketch, axis=axis), axis=axis), lambda: sketch
        )
        return carried

    def matrix(self) -> Array:
        """P."""
        return self.dense


def stream_key(seed: ArrayLike, index: ArrayLike, counter: ArrayLike, stream: ArrayLike) -> Array:
    """The key of one tensor's stream at one epoch or step; the same under ``jit`` and on any devices.

    Args:
        seed: The optimizer's seed, 0 to 2**32 - 1.
        index: The tensor's number, its position among the leaves of the parameters where its state began.
        counter: The epoch for projections, the step for rounding.
        stream: Which of the tensor's streams, a :class:`Stream`.

    Example:
        >>> one, other = (stream_key(0, 0, epoch, Stream.MOMENTUM) for epoch in (0, 1))
        >>> bool((jax.random.key_data(one) == jax.random.key_data(other)).all())
        False
    """
    # Stream and tensor in one number, 3 and 29 bits: every fold is code to compile for every tensor.
    return random.fold_in(random.fold_in(random.key_of(seed), len(Stream) * index + stream), counter)


def draw(kind: ProjectionKind, key: Array, n: int, k: int) -> Projection:
    """A projection of n columns to k, drawn at random.

    Args:
        kind: ``"gaussian"``, or any other for signs.
        key: From :func:`stream_key`.
        n: Columns.
        k: Columns of a sketch.

    Example:
        >>> projection = draw("sign", jax.random.key(0), 6, 2)
        >>> projection.encode(projection.decode_orthogonal(jnp.ones((2, 5)))).tolist() == [[1.0] * 5] * 2
        True
    """
    if kind == "gaussian":
        return GaussianProjection.drawn(key, n, k)
    return BucketProjection.signs(random.signs(random.words(key, (n,))), k)


def _along(vector: Array, axis: int, ndim: int) -> Array:
    """One number for each column, (..., n), as a factor of ``ndim`` dimensions for columns along ``axis``."""
    factor = jnp.expand_dims(vector, -3 - axis)
    return jnp.expand_dims(factor, range(ndim - factor.ndim))


def _product(dense: Array, matrix: Array, axis: int) -> Array:
    """A dense matrix times every column of ``matrix``, in full float32."""
    if axis == -2:
        return jnp.matmul(dense, matrix, precision=lax.Precision.HIGHEST)
    return jnp.matmul(matrix, dense.T, precision=lax.Precision.HIGHEST)


def bucket_sizes(n: int, k: int) -> Array:
    """How many of n columns fall into each of k buckets, bucket(j) = j mod k; float32, (k,)."""
    larger = jnp.arange(k, dtype=jnp.int32) < n % k
    return jnp.where(larger, jnp.float32(n // k + 1), jnp.float32(n // k))


def slots(values: Array, k: int, *, axis: int) -> Array:
    """(..., n, ...) as (..., ceil(n / k), k, ...), the last slot filled up with zeros.

    Args:
        values: What is cut.
        k: The size of a slot, the number of buckets: column j is at slot j div k and bucket j mod k.
        axis: Along which, counted from the end.
    """
    where, n = values.ndim + axis, values.shape[axis]
    values = _filled(values, ceil(n / k) * k, where)
    return values.reshape(*values.shape[:where], ceil(n / k), k, *values.shape[where + 1 :])


def _filled(values: Array, length: int, where: int) -> Array:
    """Zeros after the values along an axis, until it is so long."""
    missing = length - values.shape[where]
    if not missing:
        return values
    return jnp.pad(values, [(0, missing if each == where else 0) for each in range(values.ndim)])


def tile(values: Array, n: int, *, axis: int) -> Array:
    """(..., k, ...) repeated along the axis, counted from the end, until it is n long."""
    where, k = values.ndim + axis, values.shape[axis]
    count = ceil(n / k)
    repeated = jnp.broadcast_to(
        jnp.expand_dims(values, where), (*values.shape[:where], count, *values.shape[where:])
    ).reshape(*values.shape[:where], count * k, *values.shape[where + 1 :])
    return lax.slice_in_dim(repeated, 0, n, axis=where)


def normalise_buckets(weight: Array, k: int, fallback: Array) -> Array:
    """``weight`` (..., n) with norm 1 in each of k buckets; ``fallback`` in buckets that are zero."""
    norm = tile(jnp.sqrt(jnp.square(slots(weight, k, axis=-1)).sum(-2)), weight.shape[-1], axis=-1)
    return jnp.where(norm == 0, fallback, weight / jnp.where(norm == 0, 1.0, norm))


def adaptive_noise(key: Array, n: int, k: int) -> Array:
    """Noise of norm about ``ADAPTIVE_NOISE`` in every bucket, uniform, float32 of (n,)."""
    scale = float(ADAPTIVE_NOISE * (3 * k / n) ** 0.5)
    return random.uniform(key, (n,), scale)


def learn(matrix: Array, start: Array, k: int, key: Array, *, axis: int = -2) -> Array:
    """Adaptive weights: two power iterations in every bucket, w ← Vᵀ(V w) / ‖Vᵀ(V w)‖, from ``start`` plus noise.

    V is the bucket's columns of ``matrix``, so what is learnt captures as much of it as one number for each
    bucket and row can. A bucket of zeros keeps the weights that it has.

    Args:
        matrix: (..., n, m).
        start: The weights before, (..., n), of norm 1 in each bucket.
        k: Buckets.
        key: Of the noise.
        axis: Of the columns.
    """
    n = start.shape[-1]
    noise = jnp.broadcast_to(adaptive_noise(key, n, k), start.shape)
    weight = normalise_buckets(start + noise, k, start)
    for _ in range(2):
        sketch = BucketProjection.normalised(weight, k).encode(matrix, axis=axis)
        weight = normalise_buckets((matrix * tile(sketch, n, axis=axis)).sum(-3 - axis), k, weight)
    return weight
