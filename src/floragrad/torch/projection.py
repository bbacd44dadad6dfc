"""Projections of rows: encode n columns as k, decode k as n, transfer a sketch to another projection.

All of them act on the last dimension alone: rows never mix, so a shard of rows is projected by itself.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from floragrad.policy import MatrixView
from floragrad.policy import Projection as ProjectionKind
from floragrad.torch import random
from floragrad.torch.random import Philox


def random_signs(source: Philox, n: int, device: torch.device) -> Tensor:
    """Return n independent signs, each +1 or -1 with probability one half, float32."""
    return random.signs(source.draw(random.sign_count(n), device), n)


def bucket_sizes(n: int, k: int, device: torch.device) -> Tensor:
    """Return how many of n columns fall into each of k buckets, bucket(j) = j mod k; float32, (k,)."""
    sizes = torch.full((k,), float(n // k), dtype=torch.float32, device=device)
    if n % k:
        sizes[: n % k] += 1
    return sizes


def _cut(values: Tensor, columns: slice) -> Tensor:
    """Return some columns; for all columns the tensor itself, without an operation."""
    return values if columns == slice(0, values.shape[-1]) else values[..., columns]


class _Run(NamedTuple):
    """Neighbouring slices of columns that fall into the same buckets.

    Attributes:
        first: The first column.
        slices: Number of slices.
        buckets: Buckets of each slice.
        weight: Weights of the columns, (..., slices, columns per slice).
    """

    first: int
    slices: int
    buckets: slice
    weight: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """Return the columns in rows, (..., slices, columns per slice), without a copy."""
        count = self.weight.shape[-1]
        columns = _cut(rows, slice(self.first, self.first + self.slices * count))
        return columns.view(*rows.shape[:-1], self.slices, count)

    def buckets_of(self, sketch: Tensor) -> Tensor:
        """Return the buckets in a sketch, (..., 1, columns per slice)."""
        return _cut(sketch, self.buckets).unsqueeze(-2)


@dataclass(frozen=True)
class BucketProjection:
    """Projection of columns to k buckets, bucket(j) = j mod k; P[bucket(j), j] = weight[j].

    With random signs for weights this is a balanced count sketch: P Pᵀ is the diagonal of bucket sizes, and
    encoding is a signed sum of contiguous slices of the row, decoding a signed tiling. With learned weights
    of norm 1 in each bucket the rows of P are orthonormal. No matrix is built, no product taken.

    Attributes:
        weight: (n,), or (batch, 1, n) where every matrix of a batch has its own.
        gram: The diagonal of P Pᵀ, (k,): bucket sizes for signs, ones for weights of norm 1.
        part: Local columns of a matrix that is split along them, for :meth:`encode`, :meth:`decode` and
            :meth:`add_decoded_`; ``encode`` then returns the local share of a sum. None: all columns.
        has_signs: True if weights are signs, which do not change squares.
    """

    weight: Tensor
    gram: Tensor
    part: slice | None = None
    has_signs: bool = False

    @classmethod
    def signs(cls, n: int, k: int, signs: Tensor, part: slice | None = None) -> "BucketProjection":
        """Return the projection with weights +1 and -1: E[PᵀP] = I, P Pᵀ the bucket sizes."""
        return cls(signs, bucket_sizes(n, k, signs.device), part, has_signs=True)

    @classmethod
    def normalised(cls, weight: Tensor, k: int) -> "BucketProjection":
        """Return the projection with weights of norm 1 in each bucket: orthonormal rows."""
        return cls(weight, torch.ones(k, dtype=torch.float32, device=weight.device))

    def _runs(self) -> Iterator["_Run"]:
        """Yield the local columns as runs: the rest of a slice of k columns, whole slices, the start of another."""
        n, k = self.weight.shape[-1], self.gram.shape[-1]
        first, end = (0, n) if self.part is None else (self.part.start, self.part.stop)
        column = first
        while column < end:
            bucket = column % k
            width = min(k - bucket, end - column)
            slices = (end - column) // k if width == k else 1
            weight = _cut(self.weight, slice(column, column + slices * width))
            sliced = weight.view(*weight.shape[:-1], slices, width)
            yield _Run(column - first, slices, slice(bucket, bucket + width), sliced)
            column += slices * width

    @property
    def columns(self) -> Tensor:
        """Weights of the local columns."""
        return self.weight if self.part is None else self.weight[..., self.part]

    def encode(self, rows: Tensor, workspace: Tensor | None = None) -> Tensor:
        """X Pᵀ: (..., n) to (..., k); ``workspace`` is memory of X's shape, X's own too."""
        return self.sum_buckets(torch.mul(rows, self.columns, out=workspace))

    def sum_buckets(self, rows: Tensor) -> Tensor:
        """X Pᵀ, given rows whose columns are multiplied by their weights."""
        sketch: Tensor | None = None
        k = self.gram.shape[-1]
        for run in self._runs():
            share = run.of(rows).sum(-2)
            if sketch is None and run.buckets == slice(0, k):
                sketch = share
                continue
            if sketch is None:
                sketch = rows.new_zeros((*rows.shape[:-1], k))
            sketch[..., run.buckets].add_(share)
        return rows.new_zeros((*rows.shape[:-1], k)) if sketch is None else sketch

    def decode(self, sketch: Tensor) -> Tensor:
        """Z P: (..., k) to (..., n)."""
        tiles = [(run.buckets_of(sketch) * run.weight).flatten(-2) for run in self._runs()]
        if len(tiles) == 1:
            return tiles[0]
        return torch.cat(tiles, dim=-1) if tiles else sketch[..., :0]

    def add_decoded_(self, rows: Tensor, sketch: Tensor) -> Tensor:
        """X ← X + Z P, in place."""
        for run in self._runs():
            run.of(rows).addcmul_(run.buckets_of(sketch), run.weight)
        return rows

    def add_orthogonal_(self, rows: Tensor, sketch: Tensor) -> Tensor:
        """X ← X + Z (P Pᵀ)⁻¹ P, in place."""
        return self.add_decoded_(rows, sketch / self.gram)

    def transfer(self, sketch: Tensor, previous: "Projection", *, orthogonal: bool) -> Tensor:
        """Transfer a sketch of ``previous`` to this projection.

        It is decoded with ``previous`` (orthogonally: with its (P Pᵀ)⁻¹) and encoded with this one.
        """
        # P_new P_oldᵀ is diagonal: both have the same buckets.
        assert isinstance(previous, BucketProjection)
        overlap = replace(self, part=None).encode(previous.weight)
        return sketch * (overlap / previous.gram if orthogonal else overlap)

    def matrix(self) -> Tensor:
        """Return P as a dense float32 matrix, (..., k, n), for tests and inspection."""
        n, k = self.weight.shape[-1], self.gram.shape[-1]
        buckets = torch.nn.functional.one_hot(torch.arange(n, dtype=torch.int64, device=self.weight.device) % k, k)
        return buckets.T * self.weight


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast, which a caller may have on around a step, so that products are float32."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


@dataclass(frozen=True)
class GaussianProjection:
    """Gaussian projection of the paper, P ~ N(0, 1/k), drawn again on ``device`` in pieces whenever it is used.

    Attributes:
        n: Columns of a row.
        k: Columns of a sketch.
        seed: Seed of the device's generator, whose stream differs between kinds of device.
        device: Device of the pieces.
        piece: Rows of P in memory at a time; a P of no more rows is drawn once and kept.
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
            size = (part.stop - start, self.n)
            drawn = torch.randn(size, generator=generator, dtype=torch.float32, device=self.device)
            yield part, drawn.mul_(self.k**-0.5)[:, self.part or slice(None)]

    def encode(self, rows: Tensor, workspace: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """X Pᵀ."""
        sketch = rows.new_empty(*rows.shape[:-1], self.k)
        for part, drawn in self._pieces():
            with without_autocast(rows.device):
                sketch[..., part] = rows @ drawn.T
        return sketch

    def decode(self, sketch: Tensor) -> Tensor:
        """Z P."""
        columns = len(range(self.n)[self.part or slice(None)])
        return self.add_decoded_(sketch.new_zeros(*sketch.shape[:-1], columns), sketch)

    def add_decoded_(self, rows: Tensor, sketch: Tensor) -> Tensor:
        """X ← X + Z P."""
        flat = rows.view(-1, rows.shape[-1])
        for part, drawn in self._pieces():
            with without_autocast(rows.device):
                flat.addmm_(sketch[..., part].reshape(-1, drawn.shape[0]), drawn)
        return rows

    def add_orthogonal_(self, rows: Tensor, sketch: Tensor) -> Tensor:
        """Raise NotImplementedError: Gaussian rows are not orthogonal."""
        raise NotImplementedError("Gaussian rows are not orthogonal: residual=True is refused with them")

    def transfer(self, sketch: Tensor, previous: "Projection", *, orthogonal: bool) -> Tensor:
        """Transfer a sketch of ``previous`` to this projection."""
        if orthogonal:
            raise NotImplementedError("Gaussian rows are not orthogonal: residual=True is refused with them")
        assert isinstance(previous, GaussianProjection)
        return replace(self, part=None).encode(replace(previous, part=None).decode(sketch))

    def matrix(self) -> Tensor:
        """P, dense."""
        return torch.cat([drawn for _, drawn in self._pieces()])


Projection: TypeAlias = BucketProjection | GaussianProjection
"""A projection P, k x n, with E[PᵀP] = I or orthonormal rows."""


def draw_projection(
    kind: ProjectionKind,
    view: MatrixView,
    width: int,
    source: Philox,
    device: torch.device,
    part: slice | None = None,
    signs: Tensor | None = None,
) -> Projection:
    """Draw a random projection of a view's columns to ``width``.

    Args:
        kind: ``"sign"`` or ``"gaussian"``.
        view: The tensor as (batch, rows, columns).
        width: k.
        source: Stream of one tensor at one resample index; ``"gaussian"`` uses it as a seed.
        device: Device of the projection.
        part: The local columns, where the matrix is split along them.
        signs: Signs drawn from ``source``, float32 of (columns,); None draws them.
    """
    if kind == "gaussian":
        piece = max(1, view.batch * view.rows // 8)
        return GaussianProjection(view.columns, width, int(source.words(1)[0]) >> 1, device, piece, part)
    if signs is None:
        signs = random_signs(source, view.columns, device)
    return BucketProjection.signs(view.columns, width, signs, part)


def power_iteration(rows: Tensor, projection: BucketProjection) -> Tensor:
    """Return Vᵀ(V w) in every bucket, summed over the rows: (..., rows, n) to (..., 1, n).

    The sums of row blocks (or of shards) add up to that of the whole matrix.
    """
    sketch = projection.encode(rows)
    parts = [(run.of(rows) * run.buckets_of(sketch)).sum(-3, keepdim=True).flatten(-2) for run in projection._runs()]
    return torch.cat(parts, dim=-1)


def normalise_buckets(weight: Tensor, k: int, fallback: Tensor) -> Tensor:
    """Scale ``weight`` (..., n) to norm 1 in each of k buckets; use ``fallback`` in buckets that are zero."""
    n = weight.shape[-1]
    slices = ceil(n / k)
    padded = torch.nn.functional.pad(weight, (0, slices * k - n)).reshape(*weight.shape[:-1], slices, k)
    # Scaled to magnitudes around 1, whose squares neither overflow nor underflow.
    largest = padded.abs().amax(-2, keepdim=True)
    around_one = padded / largest
    norm = torch.linalg.vector_norm(around_one, dim=-2, keepdim=True)
    normal = (around_one / norm).flatten(-2)[..., :n]
    return torch.where(largest.expand_as(padded).flatten(-2)[..., :n] == 0, fallback, normal)
