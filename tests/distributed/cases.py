"""Models whose parameters are sharded, and the same steps on whole tensors to compare with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from floragrad import Flora

STEPS = 25

SHAPES: dict[str, tuple[int, ...]] = {
    "even": (16, 48),
    "uneven": (13, 40),
    "empty shards": (1, 64),
    "tall": (64, 24),
    "k does not divide n": (12, 37),
    "stacked experts": (6, 12, 32),
    "convolution": (10, 4, 3, 3),
    "bias": (19,),
    "short bias": (1,),
}
"""Tensors of all kinds; each is cut on its first dimension by FSDP2."""


class Tensors(nn.Module):
    """Some parameters, and a loss whose gradients change with every step."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tensors = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes.values()
        )


def gradient(index: int, shape: torch.Size, step: int) -> Tensor:
    """The gradient of one parameter at one step: of low rank and noise, so that every statistic matters."""
    generator = torch.Generator().manual_seed(1000 * index + step)
    noise = torch.randn(shape, generator=generator)
    sizes = torch.logspace(-1, 1, shape[-1]) if shape else torch.ones(())
    return noise * sizes


def run_steps(
    params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: range = range(STEPS),
    *,
    one_by_one: bool = False,
) -> None:
    """Give every parameter its gradient, placed as it is, and step: together, or one by one from the last."""
    for step in steps:
        for index, param in enumerate(params):
            grad = gradient(index, param.shape, step).to(param.dtype)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
            param.grad = grad
        if one_by_one:
            assert isinstance(optimizer, Flora)
            for param in reversed(params):
                optimizer.step_parameter(param)
        else:
            optimizer.step()


def batch(number: int, source: int) -> Tensor:
    """A micro-batch of one of a few processes, for a model of 64 inputs."""
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(10 * number + source))


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def whole_state(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """The whole of a parameter's state on every rank."""
    return {key: full(value).clone() for key, value in optimizer.state[param].items()}


def as_parameter(tensor: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> nn.Parameter:
    """A sharded parameter."""
    return nn.Parameter(distribute_tensor(tensor, mesh, placements, src_data_rank=None))


Sharding = Callable[[Tensors], list[nn.Parameter]]


def fsdp(model: Tensors) -> list[nn.Parameter]:
    """FSDP2 over all processes."""
    fully_shard(model)
    return list(model.tensors)


def hsdp(model: Tensors) -> list[nn.Parameter]:
    """FSDP2 over pairs, replicated."""
    size = torch.distributed.get_world_size()
    fully_shard(model, mesh=init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicate", "shard")))
    return list(model.tensors)


def tensor_parallel(*split: int | None) -> Sharding:
    """Each tensor split on a dimension, or replicated, over all processes."""

    def shard(model: Tensors) -> list[nn.Parameter]:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        return [
            as_parameter(each.detach(), mesh, (Replicate() if dim is None else Shard(dim),))
            for each, dim in zip(model.tensors, split, strict=True)
        ]

    return shard


def fsdp_and_tensor_parallel(*split: int | None) -> Sharding:
    """Tensor parallelism over pairs of processes, and FSDP2 over the pairs."""

    def shard(model: Tensors) -> list[nn.Parameter]:
        size = torch.distributed.get_world_size()
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        model.tensors = nn.ParameterList(
            as_parameter(each.detach(), mesh["tp"], (Replicate() if dim is None else Shard(dim),))
            for each, dim in zip(model.tensors, split, strict=True)
        )
        fully_shard(model, mesh=mesh["dp"])
        return list(model.tensors)

    return shard


def options_of(**options: Any) -> dict[str, Any]:
    """Options under which projections are resampled within the steps."""
    return {"lr": 1e-2, "ratio": 4, "kappa": 10, "state_dtype": "float32", **options}
