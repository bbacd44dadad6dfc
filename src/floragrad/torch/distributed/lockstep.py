"""Sums over the parts of sharded tensors: all of them share every collective."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from floragrad.torch.distributed.collectives import sum_together
from floragrad.torch.part import ShardSum

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor, without loading what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def here(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def sum_over_parts(shares: Iterable[ShardSum]) -> None:
    """Replace shares by their sums over all parts of their tensors: one all-reduce for each mesh dimension.

    Several where they are large.
    """
    groups: dict[tuple[DeviceMesh, int], list[Tensor]] = {}
    for value, over, part, _ in sorted(shares, key=lambda share: share.order):
        for axis in over:
            for mesh_dim in part.split.get(axis, ()):
                assert part.mesh is not None
                groups.setdefault((part.mesh, mesh_dim), []).append(value)
    for (mesh, mesh_dim), values in groups.items():
        sum_together(values, mesh.get_group(mesh_dim))
