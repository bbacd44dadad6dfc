"""ZeroRedundancyOptimizer around Flora: each process has a partition of the tensors, and numbers of its own."""

import copy
from typing import Any

import pytest
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from floragrad import Flora
from tests.distributed.conftest import Worlds

OPTIONS: dict[str, Any] = {"lr": 1e-2, "rank": 4, "kappa": 3}


def params() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(32, 32)) for _ in range(5)]


def train(tensors: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in tensors:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def gone_on(rank: int, again: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters of a run that was partitioned throughout, and of one that went on whole, or partitioned anew."""
    first = params()
    sharded = ZeroRedundancyOptimizer(first, Flora, **OPTIONS)
    train(first, sharded, range(4))
    sharded.consolidate_state_dict(to=0)
    saved = [copy.deepcopy(sharded.state_dict()) if rank == 0 else None]
    torch.distributed.broadcast_object_list(saved)
    second = [torch.nn.Parameter(param.detach().clone()) for param in first]
    optimizer = ZeroRedundancyOptimizer(second, Flora, **OPTIONS) if again else Flora(second, **OPTIONS)
    optimizer.load_state_dict(saved[0])
    train(first, sharded, range(4, 9))
    train(second, optimizer, range(4, 9))
    return [param.detach() for param in first], [param.detach() for param in second]


@pytest.mark.parametrize("again", [False, True], ids=["whole", "partitioned"])
def test_a_partitioned_run_goes_on_bit_for_bit(worlds: Worlds, again: bool) -> None:
    for first, second in worlds(2).run(gone_on, again):
        assert all(map(torch.equal, first, second))
