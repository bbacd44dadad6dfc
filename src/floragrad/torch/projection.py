"""Projections of rows: encode n columns as k, decode k as n, carry a sketch from one projection to the next.

All of them act on the last dimension alone: rows never mix, so a shard of rows is projected by itself.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from floragrad._streams import Stream
from floragrad.policy import MatrixView
from floragrad.policy import Projection as ProjectionKind


class Projection(Protocol):
    """P, k x n, with E[PᵀP] = I or orthonormal rows. The update takes one of these, never a seed."""

    def encode(self, rows: Tensor) -> Tensor:
        """X Pᵀ: (..., n) to (..., k)."""
        ...

    def decode(self, sketch: Tensor) -> Tensor:
        """Z P: (..., k) to (..., n)."""
        ...

    def add_orthogonal_(self, rows: Tensor, sketch: Tensor) -> Tensor:
        """X ← X + Z (P Pᵀ)⁻¹ P, in place."""
        ...

    def transfer(self, sketch: Tensor, previous: "Projection", *, orthogonal: bool) -> Tensor:
        """Z, written under ``previous``, as this projection would have written it.

        Decodes with ``previous`` (orthogonally: with its (P Pᵀ)⁻¹) and encodes with this one.
        """
        ...

    def matrix(self) -> Tensor:
        """P as a dense float32 matrix, (..., k, n), for tests and for looking at."""
        ...


def philox(seed: int, index: int, counter: int, stream: Stream) -> np.random.Philox:
    """The counter-based generator of one tensor's stream at one epoch or step.

    The numbers depend on the four arguments alone: not on the device, the order of calls, or how many
    devices share the tensor.

    Args:
        seed: The optimizer's seed, 0 to 2**63 - 1.
        index: The tensor's position in the optimizer.
        counter: The epoch for projections, the step for rounding.
        stream: Which of the tensor's streams.
    """
    return np.random.Philox(key=[seed, index], counter=[0, counter, int(stream), 0])


def random_signs(n: int, seed: int, index: int, epoch: int, stream: Stream) -> Tensor:
    """N independent signs, each +1 or -1 with probability one half, as float32 on the CPU."""
    return signs_from(philox(seed, index, epoch, stream), n)


def signs_from(source: np.random.Philox, n: int) -> Tensor:
    """N signs from a generator of :func:`philox`."""
    words = source.random_raw(ceil(n / 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=n)
    return torch.from_numpy(bits.astype(np.float32)).mul_(2).sub_(1)


def bucket_sizes(n: int, k: int) -> Tensor:
    """How many of n columns fall into each of k buckets, bucket(j) = j mod k; float32, (k,)."""
    return torch.full((k,), float(n // k)).add_((torch.arange(k) < n % k).float())


@dataclass(frozen=True)
class BucketProjection:
    """Columns dealt into k buckets, bucket(j) = j mod k; P[bucket(j), j] = weight[j].

    With random signs for weights this is a balanced count sketch: P Pᵀ is the diagonal of bucket sizes, and
    encoding is a signed sum of contiguous slices of the row, decoding a signed tiling. With learnt weights
    of norm 1 in each bucket the rows of P are orthonormal. No matrix is built, no product taken.

    Attributes:
        weight: (n,), or (batch, 1, n) where every matrix of a batch has its own.
        gram: The diagonal of P Pᵀ, (k,): bucket sizes for signs, ones for weights of norm 1.
        part: The columns that :meth:`encode`, :meth:`decode` and :meth:`add_orthogonal_` are given, where a
            matrix is split along them: then ``encode`` gives this part's share of a sum. None: all.
    """

    weight: Tensor
    gram: Tensor
    part: slice | None = None

    @classmethod
    def signs(cls, n: int, k: int, signs: Tensor, part: slice | None = None) -> "BucketProjection":
        """Of +1 and -1: E[PᵀP] = I, P Pᵀ the bucket sizes."""
        return cls(signs, bucket_sizes(n, k).to(signs.device), part)

    @classmethod
    def normalised(cls, weight: Tensor, k: int) -> "BucketProjection":
        """Of weights with norm 1 in each bucket: orthonormal rows."""
        return cls(weight, torch.ones(k, device=weight.device))

    def _slices(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Runs of neighbouring columns in neighbouring buckets: the columns, the buckets, the weights."""
        n, k = self.weight.shape[-1], self.gram.shape[-1]
        first, end = (0, n) if self.part is None else (self.part.start, self.part.stop)
        column = first
        while column < end:
            bucket = column % k
            width = min(k - bucket, end - column)
            columns = slice(column - first, column - first + width)
            yield columns, slice(bucket, bucket + width), self.weight[..., column : column + width]
            column += width

    def _sliced(self, rows: Tensor) -> Tensor | None:
        """Whole rows as (..., n / k, k), without a copy: one operation does for all slices. None where k is no part."""
        n, k = self.weight.shape[-1], self.gram.shape[-1]
        return rows.view(*rows.shape[:-1], n // k, k) if self.part is None and n % k == 0 else None

    def encode(self, rows: Tensor) -> Tensor:
        """X Pᵀ."""
        sketch: Tensor | None = None
        k = self.gram.shape[-1]
        for columns, buckets, weight in self._slices():
            if sketch is None and buckets == slice(0, k):
                sketch = rows[..., columns] * weight
                continue
            if sketch is None:
                sketch = rows.new_zeros((*rows.shape[:-1], k))
            sketch[..., buckets].addcmul_(rows[..., columns], weight)
        return rows.new_zeros((*rows.shape[:-1], k)) if sketch is None else sketch

    def decode(self, sketch: Tensor) -> Tensor:
        """Z P."""
        weight = self._sliced(self.weight)
        if weight is not None:
            return (sketch.unsqueeze(-2) * weight).flatten(-2)
        tiles = [sketch[..., buckets] * weight for _, buckets, weight in self._slices()]
        return torch.cat(tiles, dim=-1) if tiles else sketch[..., :0]

    def add_orthogonal_(self, rows: Tensor, sketch: Tensor) -> Tensor:
        """X ← X + Z (P Pᵀ)⁻¹ P."""
        scaled = sketch / self.gram
        slices, weights = self._sliced(rows), self._sliced(self.weight)
        if slices is not None and weights is not None:
            slices.addcmul_(scaled.unsqueeze(-2), weights)
            return rows
        for columns, buckets, weight in self._slices():
            rows[..., columns].addcmul_(scaled[..., buckets], weight)
        return rows

    def transfer(self, sketch: Tensor, previous: Projection, *, orthogonal: bool) -> Tensor:
        """Z as this projection would have written it."""
        # P_new P_oldᵀ is diagonal: both deal the columns into the same buckets.
        assert isinstance(previous, BucketProjection)
        overlap = replace(self, part=None).encode(previous.weight)
        return sketch * (overlap / previous.gram if orthogonal else overlap)

    def matrix(self) -> Tensor:
        """P, dense."""
        n, k = self.weight.shape[-1], self.gram.shape[-1]
        buckets = torch.nn.functional.one_hot(torch.arange(n, device=self.weight.device) % k, k)
        return buckets.T * self.weight


@dataclass(frozen=True)
class GaussianProjection:
    """The paper's P ~ N(0, 1/k), regenerated on ``device`` piece by piece whenever it is used.

    Attributes:
        n: Columns of a row.
        k: Columns of a sketch.
        seed: Seeds the device's generator, whose numbers differ between kinds of device.
        device: Where the pieces are drawn.
        piece: Rows of P that may exist at a time; a P of no more rows is drawn once and kept.
        part: As in :class:`BucketProjection`.
    """

    n: int
    k: int
    seed: int
    device: torch.device
    piece: int
    part: slice | None = None

    @cached_property
    def _whole(self) -> list[tuple[slice, Tensor]]:
        return list(self._drawn())

    def _pieces(self) -> Iterable[tuple[slice, Tensor]]:
        return self._whole if self.k <= self.piece else self._drawn()

    def _drawn(self) -> Iterator[tuple[slice, Tensor]]:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        for start in range(0, self.k, self.piece):
            part = slice(start, min(start + self.piece, self.k))
            drawn = torch.randn(part.stop - start, self.n, generator=generator, device=self.device)
            yield part, drawn.mul_(self.k**-0.5)[:, self.part or slice(None)]

    def encode(self, rows: Tensor) -> Tensor:
        """X Pᵀ."""
        sketch = rows.new_empty(*rows.shape[:-1], self.k)
        for part, drawn in self._pieces():
            sketch[..., part] = rows @ drawn.T
        return sketch

    def decode(self, sketch: Tensor) -> Tensor:
        """Z P."""
        columns = len(range(self.n)[self.part or slice(None)])
        rows = sketch.new_zeros(*sketch.shape[:-1], columns)
        for part, drawn in self._pieces():
            rows.view(-1, columns).addmm_(sketch[..., part].reshape(-1, drawn.shape[0]), drawn)
        return rows

    def add_orthogonal_(self, rows: Tensor, sketch: Tensor) -> Tensor:
        """Refused: Gaussian rows are not orthogonal."""
        raise NotImplementedError("Gaussian rows are not orthogonal: residual=True is refused with them")

    def transfer(self, sketch: Tensor, previous: Projection, *, orthogonal: bool) -> Tensor:
        """Z as this projection would have written it."""
        if orthogonal:
            raise NotImplementedError("Gaussian rows are not orthogonal: residual=True is refused with them")
        assert isinstance(previous, GaussianProjection)
        return replace(self, part=None).encode(replace(previous, part=None).decode(sketch))

    def matrix(self) -> Tensor:
        """P, dense."""
        return torch.cat([drawn for _, drawn in self._pieces()])


def draw_projection(
    kind: ProjectionKind,
    view: MatrixView,
    width: int,
    source: np.random.Philox,
    device: torch.device,
    part: slice | None = None,
) -> Projection:
    """A projection of a view's columns to ``width``, drawn at random.

    Args:
        kind: ``"sign"`` or ``"gaussian"``.
        view: The tensor as (batch, rows, columns).
        width: k.
        source: From :func:`philox`, for one tensor at one epoch; of ``"gaussian"`` it is only the seed.
        device: Where the projection is used.
        part: The columns that are here, where the matrix is split along them.
    """
    if kind == "gaussian":
        piece = max(1, view.batch * view.rows // 8)
        return GaussianProjection(view.columns, width, int(source.random_raw()) >> 1, device, piece, part)
    return BucketProjection.signs(view.columns, width, signs_from(source, view.columns).to(device), part)


def power_iteration(rows: Tensor, projection: BucketProjection) -> Tensor:
    """Vᵀ(V w) in every bucket, summed over the rows: (..., rows, n) to (..., 1, n).

    The sums of row blocks (or of shards) add up to that of the whole matrix.
    """
    sketch = projection.encode(rows)
    parts = [
        (rows[..., columns] * sketch[..., buckets]).sum(-2, keepdim=True)
        for columns, buckets, _ in projection._slices()
    ]
    return torch.cat(parts, dim=-1)


def normalise_buckets(weight: Tensor, k: int, fallback: Tensor) -> Tensor:
    """``weight`` (..., n) with norm 1 in each of k buckets; ``fallback`` in buckets that are zero."""
    n = weight.shape[-1]
    slots = ceil(n / k)
    padded = torch.nn.functional.pad(weight, (0, slots * k - n)).reshape(*weight.shape[:-1], slots, k)
    norm = torch.linalg.vector_norm(padded, dim=-2, keepdim=True).expand_as(padded).flatten(-2)[..., :n]
    return torch.where(norm == 0, fallback, weight / norm)
