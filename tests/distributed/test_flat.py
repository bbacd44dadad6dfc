"""Flat parameters, which hide matrices, are refused by name."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from floragrad import Flora
from tests.distributed.conftest import Worlds


def wrapped(strategy: ShardingStrategy, *, use_orig_params: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 is deprecated, and says so
        return FullyShardedDataParallel(
            model, sharding_strategy=strategy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )


def fully_sharded_data_parallel(_: int) -> None:
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD):
        flat = wrapped(strategy, use_orig_params=False)
        with pytest.raises(ValueError, match=r"parameter 0 .* flat parameter of FullyShardedDataParallel.*FSDP2"):
            Flora(flat.parameters(), lr=1e-3)
    pieces = wrapped(ShardingStrategy.FULL_SHARD, use_orig_params=True)
    with pytest.raises(ValueError, match=r"0.weight has shape .* a piece of a flat parameter.*NO_SHARD.*FSDP2"):
        Flora(pieces.named_parameters(), lr=1e-3)
    whole = wrapped(ShardingStrategy.NO_SHARD, use_orig_params=True)
    assert Flora(whole.parameters(), lr=1e-3, rank=4).report().compressed == 2


def test_fully_sharded_data_parallel(worlds: Worlds) -> None:
    """FSDP1, but where it gives the shapes back."""
    worlds(2).run(fully_sharded_data_parallel)


def test_zero_3() -> None:
    """DeepSpeed leaves an empty vector with the matrix's shape in ``ds_shape``."""
    param = nn.Parameter(torch.empty(0))
    param.ds_shape = torch.Size((64, 32))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(64, 32\) is held by DeepSpeed's ZeRO-3.*FSDP2"):
        Flora([param], lr=1e-3)


def test_zero_1_and_2() -> None:
    """DeepSpeed replaces the groups' parameters by flat ones after the optimizer is made."""
    model = nn.Linear(64, 32)
    optimizer = Flora(model.parameters(), lr=1e-3, rank=4)
    flat = nn.Parameter(torch.cat([param.detach().flatten() for param in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    before = flat.detach().clone()
    with pytest.raises(RuntimeError, match=r"flat vector of shape \(2080,\).*ZeRO.*FSDP2"):
        optimizer.step()
    assert torch.equal(flat, before)
