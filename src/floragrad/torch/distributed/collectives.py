"""Collectives over processes and over the shards of tensors: a few large ones, for any number of tensors."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeGuard

import torch
from torch import Tensor, distributed

from floragrad.torch.part import Part, ShardSum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

BUCKET_BYTES: Final = 25 * 2**20
"""Bytes of one collective at most, as a bucket of DistributedDataParallel by default."""


@dataclass(frozen=True)
class Ranks:
    """Processes that train together, two or more.

    Attributes:
        group: Their process group; None is the default group.
        rank: Rank of this process.
        size: Number of processes.
    """

    group: "ProcessGroup | None"
    rank: int
    size: int

    @classmethod
    def from_group(cls, group: "ProcessGroup | None") -> "Ranks | None":
        """Return the ranks of a group, None being the default group; None if this process trains alone.

        Raises:
            ValueError: This process is not in the group.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        size = distributed.get_world_size(group)
        if size < 1:
            raise ValueError("process_group is one that this process is not in: give the group that it trains with")
        return cls(group, distributed.get_rank(group), size) if size > 1 else None

    def all_gather(self, values: Sequence[int], device: torch.device) -> list[list[int]]:
        """Gather integers from every rank, in the order of ranks."""
        local = torch.tensor(values, dtype=torch.int64, device=device)
        gathered = [torch.empty_like(local) for _ in range(self.size)]
        distributed.all_gather(gathered, local, group=self.group)
        return [each.tolist() for each in gathered]

    def all_reduce_any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """Return which flags are set on any rank."""
        reduced = torch.tensor(flags, dtype=torch.uint8, device=device)
        distributed.all_reduce(reduced, distributed.ReduceOp.MAX, group=self.group)
        return [bool(each) for each in reduced.tolist()]

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace contiguous float32 tensors by their sums over the ranks."""
        all_reduce_flat(tensors, self.group)

    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send bytes to every rank, and receive some from each.

        Args:
            outgoing: uint8, one for each rank.
            sizes: Number of bytes from each.
        """
        received = outgoing[0].new_empty(sum(sizes))
        sent = [each.numel() for each in outgoing]
        distributed.all_to_all_single(received, torch.cat(list(outgoing)), list(sizes), sent, group=self.group)
        return list(torch.split(received, list(sizes)))


def all_reduce_flat(tensors: Sequence[Tensor], group: "ProcessGroup | None") -> None:
    """Replace contiguous float32 tensors by their sums over a group, in flat pieces of bounded size."""
    length = BUCKET_BYTES // 4
    pieces = [piece for tensor in tensors for piece in torch.split(tensor.view(-1), length)]
    for bucket in _buckets(pieces, length):
        flat = bucket[0] if len(bucket) == 1 else torch.cat(bucket)
        distributed.all_reduce(flat, group=group)
        if len(bucket) > 1:
            sums = torch.split(flat, [each.numel() for each in bucket])
            for piece, summed in zip(bucket, sums, strict=True):
                piece.copy_(summed)


def _buckets(pieces: Sequence[Tensor], length: int) -> list[list[Tensor]]:
    """Group neighbours on one device into buckets of at most ``length`` elements."""
    buckets: list[list[Tensor]] = []
    filled = 0
    for piece in pieces:
        if not buckets or filled + piece.numel() > length or piece.device != buckets[-1][0].device:
            buckets.append([])
            filled = 0
        buckets[-1].append(piece)
        filled += piece.numel()
    return buckets


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor is a DTensor, without importing ``torch.distributed.tensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def to_local(tensor: Tensor) -> Tensor:
    """Return the local part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def split_groups(parts: Iterable[tuple[Part | None, torch.device]]) -> Iterator[tuple[Ranks, torch.device]]:
    """Yield the processes that some tensors are split over, once for each dimension of each mesh, with a device."""
    found: dict[tuple[DeviceMesh, int], torch.device] = {}
    for part, device in parts:
        if part is None or part.mesh is None:
            continue
        for mesh_dim in sorted({each for dims in part.split.values() for each in dims}):
            found.setdefault((part.mesh, mesh_dim), device)
    for (mesh, mesh_dim), device in found.items():
        yield Ranks(mesh.get_group(mesh_dim), mesh.get_local_rank(mesh_dim), mesh.size(mesh_dim)), device


def all_reduce_shards(shares: Iterable[ShardSum]) -> None:
    """Replace shares by their sums over all parts of their tensors.

    All tensors share one all-reduce for each mesh dimension; several where they are large.
    """
    groups: dict[tuple[DeviceMesh, int], list[Tensor]] = {}
    for value, axes, part, _ in sorted(shares, key=lambda share: share.order):
        for axis in axes:
            for mesh_dim in part.split.get(axis, ()):
                assert part.mesh is not None
                groups.setdefault((part.mesh, mesh_dim), []).append(value)
    for (mesh, mesh_dim), values in groups.items():
        all_reduce_flat(values, mesh.get_group(mesh_dim))
