"""What processes say to each other: a few large collectives, however many tensors there are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BUCKET_BYTES: Final = 25 * 2**20
"""What one collective carries at most, as a bucket of DistributedDataParallel does by default."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, two or more of them.

    Attributes:
        group: Theirs; None is the default group.
        rank: This process among them.
        size: How many they are.
    """

    group: "ProcessGroup | None"
    rank: int
    size: int

    @classmethod
    def of(cls, group: "ProcessGroup | None") -> "Ranks | None":
        """The ranks of a group, of the default group for None; None where this process trains alone.

        Raises:
            ValueError: This process is not in the group.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        size = distributed.get_world_size(group)
        if size < 1:
            raise ValueError("process_group is one that this process is not in: give the group that it trains with")
        return cls(group, distributed.get_rank(group), size) if size > 1 else None

    def gather(self, values: Sequence[int], device: torch.device) -> list[list[int]]:
        """The integers of every rank, in the order of ranks."""
        own = torch.tensor(values, dtype=torch.int64, device=device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(found, own, group=self.group)
        return [each.tolist() for each in found]

    def any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """Which flags are set on some rank."""
        found = torch.tensor(flags, dtype=torch.uint8, device=device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.group)
        return [bool(each) for each in found.tolist()]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace contiguous float32 tensors by their sums over the ranks."""
        sum_together(tensors, self.group)

    def swap(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send bytes to every rank, and receive some from each.

        Args:
            outgoing: uint8, one for each rank.
            sizes: How many bytes come from each.
        """
        received = outgoing[0].new_empty(sum(sizes))
        sent = [each.numel() for each in outgoing]
        distributed.all_to_all_single(received, torch.cat(list(outgoing)), list(sizes), sent, group=self.group)
        return list(torch.split(received, list(sizes)))


def sum_together(tensors: Sequence[Tensor], group: "ProcessGroup | None") -> None:
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
    """Neighbours on one device together, as long as they have no more than ``length`` elements."""
    buckets: list[list[Tensor]] = []
    filled = 0
    for piece in pieces:
        if not buckets or filled + piece.numel() > length or piece.device != buckets[-1][0].device:
            buckets.append([])
            filled = 0
        buckets[-1].append(piece)
        filled += piece.numel()
    return buckets
