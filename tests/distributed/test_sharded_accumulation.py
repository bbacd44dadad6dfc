"""Gradients of sharded parameters are folded shard by shard, as those of whole ones are."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from floragrad import Flora, GradientAccumulator, param_groups
from tests.distributed.cases import as_parameter, full
from tests.distributed.conftest import Worlds
from tests.distributed.test_training import llama, sharded
from tests.marks import slow

WINDOWS, MICRO_BATCHES, BATCH = 3, 4, 4
MAX_NORM = 0.5
TOLERANCE = 1e-5


def micro_batches(rank: int, size: int) -> torch.Tensor:
    """(windows, micro-batches, sequences, tokens) of one rank."""
    tokens = torch.randint(96, (WINDOWS, MICRO_BATCHES, BATCH, 16), generator=torch.Generator().manual_seed(1))
    return tokens.unflatten(2, (size, BATCH // size))[:, :, rank]


def replicated(model: nn.Module) -> nn.Module:
    """FSDP2 over pairs of processes, replicated."""
    return sharded(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


WRAPPED = {"fsdp": sharded, "hsdp": replicated}


def build(*, shard: str = "", release: bool, **options: Any) -> tuple[nn.Module, GradientAccumulator]:
    model = llama(torch.float64)
    if shard:
        WRAPPED[shard](model)
    optimizer: torch.optim.Optimizer
    if release:
        optimizer = Flora(param_groups(model, lr=2e-3), rank=8, state_dtype="float32")
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, GradientAccumulator(optimizer, MICRO_BATCHES, release=release, **options)


def go(model: nn.Module, accumulator: GradientAccumulator, tokens: torch.Tensor, *, clip: bool = True) -> list[float]:
    """Windows of micro-batches; the norms."""
    norms = []
    for window in tokens:
        for batch in window:
            accumulator.backward(model(input_ids=batch, labels=batch).loss)
        if clip:
            norms.append(accumulator.clip_grad_norm_(MAX_NORM).item())
        accumulator.step()
    return norms


def equals_whole(rank: int, shard: str, release: bool, clip: bool, options: dict[str, Any]) -> None:
    size = torch.distributed.get_world_size()
    if not clip:
        options = {**options, "clip": False}
    model, accumulator = build(shard=shard, release=release, **options)
    norms = go(model, accumulator, micro_batches(rank, size), clip=clip)
    # A process by itself, though there is a group: it has nobody to sum with.
    alone = [torch.distributed.new_group([each]) for each in range(size)][rank]
    whole, other = build(release=release, process_group=alone, **options)
    expected = go(whole, other, micro_batches(0, 1), clip=clip)
    assert norms == pytest.approx(expected, rel=TOLERANCE)
    for param, there in zip(whole.parameters(), model.parameters(), strict=True):
        assert (param - full(there)).abs().max() <= TOLERANCE * param.abs().max()


@pytest.mark.parametrize(
    ("shard", "release", "clip", "options"),
    [
        slow("fsdp", True, True, {"state_dtype": "float32"}),
        ("fsdp", True, True, {"state_dtype": "float32", "ratio": 4}),
        slow("fsdp", True, False, {"state_dtype": "float32", "ratio": 4}),
        ("fsdp", False, True, {"state_dtype": "float32", "ratio": 4}),
        slow("fsdp", True, True, {"state_dtype": "float32", "ratio": 4, "projection": "gaussian"}),
        ("hsdp", True, True, {"state_dtype": "float32", "ratio": 4}),
    ],
    ids=str,
)
def test_equals_whole_parameters(
    worlds: Worlds, shard: str, release: bool, clip: bool, options: dict[str, Any]
) -> None:
    """The same projections for every row, so the same sketches, norms and parameters after three windows."""
    worlds(4 if shard == "hsdp" else 2).run(equals_whole, shard, release, clip, options)


def rounds_as_whole(rank: int, state_dtype: str) -> None:
    size = torch.distributed.get_world_size()
    alone = [torch.distributed.new_group([each]) for each in range(size)][rank]
    sketches = []
    for shard in ("fsdp", ""):
        group = {} if shard else {"process_group": alone}
        model, accumulator = build(shard=shard, release=True, state_dtype=state_dtype, **group)
        tokens = micro_batches(rank, size) if shard else micro_batches(0, 1)
        for batch in tokens[0][:-1]:
            accumulator.backward(model(input_ids=batch, labels=batch).loss)
        sketches.append({entry.name: (entry, entry.sketch) for entry in accumulator._entries})
    parts, wholes = sketches
    equal = numbers = 0
    for name, (entry, sketch) in parts.items():
        here, whole = sketch.buffers["data"], wholes[name][1].buffers["data"]
        rows = entry.part.leading[-1]
        numbers += here.numel()
        equal += int((here == whole[:, rows]).sum())
    assert numbers > 0
    assert equal >= 0.95 * numbers


@pytest.mark.parametrize("state_dtype", ["int4", slow("int8"), "bfloat16"])
def test_rounds_as_whole_parameters(worlds: Worlds, state_dtype: str) -> None:
    """The same random bits for every row: payloads are the same but where a last bit of a sum decides.

    Vectors are float32, where the last bit shows itself; they are 2% of the numbers here.
    """
    worlds(2).run(rounds_as_whole, state_dtype)


def resumes(rank: int) -> None:
    size = torch.distributed.get_world_size()
    tokens = micro_batches(rank, size)
    model, accumulator = build(shard="fsdp", release=True)
    twin, other = build(shard="fsdp", release=True)
    for batch in tokens[0][:2]:
        accumulator.backward(model(input_ids=batch, labels=batch).loss)
    saved = copy.deepcopy(accumulator.state_dict())
    other.load_state_dict(saved)
    for each, gatherer in ((model, accumulator), (twin, other)):
        for batch in tokens[0][2:]:
            gatherer.backward(each(input_ids=batch, labels=batch).loss)
        gatherer.clip_grad_norm_(MAX_NORM)
        gatherer.step()
    for param, there in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(full(param), full(there))
    saved["rank"] = [size - 1 - rank, size]
    with pytest.raises(ValueError, match=f"is rank {size - 1 - rank}'s of {size}, this is rank {rank}"):
        other.load_state_dict(saved)


def test_a_window_goes_on_where_it_was_saved(worlds: Worlds) -> None:
    """Each rank with its own shards' sketches, bit for bit; another rank's are refused."""
    worlds(2).run(resumes)


def refusals(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    columns = as_parameter(torch.zeros(64, 96), mesh, (Shard(1),))
    rows = as_parameter(torch.zeros(64, 96), mesh, (Shard(0),))
    with pytest.raises(ValueError, match=r"split along its columns.*accumulate exactly"):
        GradientAccumulator(Flora([columns], lr=1e-3, rank=8), 2)
    with pytest.raises(ValueError, match=r"some parameters are sharded.*process_group"):
        GradientAccumulator(Flora([rows, nn.Parameter(torch.zeros(64, 96))], lr=1e-3, rank=8), 2)
    GradientAccumulator(Flora([rows], lr=1e-3, rank=8), 2).close()


def test_what_cannot_be_gathered_is_refused(worlds: Worlds) -> None:
    """With the way out."""
    worlds(2).run(refusals)
