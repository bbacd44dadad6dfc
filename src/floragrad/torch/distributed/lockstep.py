"""Steps of sharded parameters, run side by side, so that all of them share every collective."""

import sys
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from torch import Tensor

from floragrad.torch.distributed.collectives import sum_together
from floragrad.torch.part import Part, ShardSum

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class ShardStep(NamedTuple):
    """The step of one part of a tensor.

    Attributes:
        sums: Hands out sums over parts between its passes.
        part: What is here.
        mesh: The devices that the parameter is spread over.
    """

    sums: Generator[list[ShardSum], None, None]
    part: Part
    mesh: "DeviceMesh"


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor, without loading what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def here(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def step_together(steps: Iterable[ShardStep]) -> None:
    """Run steps to their ends: one all-reduce between two passes for each mesh dimension that splits a tensor.

    So FSDP2 takes two for all parameters, the columns' statistics and the updates' norms, and two more where learnt
    weights are refreshed; a second mesh dimension as many again; and tensors split along their columns one for the
    sketches of whole rows.
    """
    active = list(steps)
    while active:
        waiting = [(each, next(each.sums, None)) for each in active]
        active = [each for each, sums in waiting if sums is not None]
        sum_over_parts((sums, each.part, each.mesh) for each, sums in waiting if sums is not None)


def sum_over_parts(shares: "Iterable[tuple[list[ShardSum], Part, DeviceMesh]]") -> None:
    """Add up what parts of tensors have of their sums, in place: one all-reduce for each mesh dimension.

    A few where they are large.

    Args:
        shares: The sums, the part that has a share of them, and the devices that have the others.
    """
    groups: dict[tuple[DeviceMesh, int], list[Tensor]] = {}
    for sums, part, mesh in shares:
        for value, over in sums:
            for axis in over:
                for mesh_dim in part.split.get(axis, ()):
                    groups.setdefault((mesh, mesh_dim), []).append(value)
    for (mesh, mesh_dim), values in groups.items():
        sum_together(values, mesh.get_group(mesh_dim))
