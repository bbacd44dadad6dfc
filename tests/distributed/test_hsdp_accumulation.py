"""Replicas of FSDP2 shards that exchange sketches: few runs of four processes, each of many checks."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from floragrad import Flora, GradientAccumulator
from floragrad.torch.distributed.collectives import to_local
from tests.distributed.cases import batch, full
from tests.distributed.conftest import Worlds

STEPS = 2
MAX_NORM = 0.05


class Net(nn.Module):
    """Shards that are even, uneven and empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 130)
        self.second = nn.Linear(130, 7)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor, overflow: float = 0.0) -> Tensor:
        """The loss; ``overflow`` is a factor in the gradients of the last row alone, which one shard has."""
        hidden = torch.tanh(self.first(inputs))
        loss = (self.second(hidden) * self.gain - inputs[:, :7]).square().mean()
        return loss + (self.second(hidden.detach())[:, 6] * overflow).sum()


def sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    """It magnifies no difference, and is sensitive to the size of gradients."""
    return [torch.optim.SGD([param], lr=0.1) for param in model.parameters()]


def flora(model: nn.Module) -> torch.optim.Optimizer:
    return Flora(model.parameters(), lr=1e-2, ratio=2, kappa=7)


class Job:
    """What one of four processes, two replicas of two shards, does."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.mesh: DeviceMesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        self.replicas = self.mesh["replicate"].get_group()
        self.alone = [distributed.new_group([each]) for each in range(4)][rank]

    def build(
        self,
        optimizer: Callable[[nn.Module], Any],
        steps: int = STEPS,
        *,
        shards: bool = True,
        deferred: bool = False,
        **options: Any,
    ) -> tuple[Net, GradientAccumulator]:
        model = Net()
        if shards:
            for module in (model.first, model.second, model):
                fully_shard(module, mesh=self.mesh["shard"])
        group = self.replicas if shards else self.alone
        if deferred:
            options["defer_reduction"] = model
        return model, GradientAccumulator(optimizer(model), steps, **{"process_group": group, **options})

    def go(self, model: Net, accumulator: GradientAccumulator, numbers: range, sources: Sequence[int]) -> list[float]:
        """Micro-batches, each of these sources', and the norms of their windows."""
        norms = []
        for number in numbers:
            for source in sources:
                accumulator.backward(model(batch(number, source)))
            if accumulator.complete:
                norms.append(accumulator.clip_grad_norm_(MAX_NORM).item())
                assert accumulator.step()
        return norms

    def trained(self, **options: Any) -> tuple[Net, list[float]]:
        """A model after a few windows, and their norms."""
        model, accumulator = self.build(flora, **options)
        return model, self.go(model, accumulator, range(6 * STEPS), [self.rank])

    def assert_alike(self, model: Net, norms: list[float]) -> None:
        """The same bits of each shard in both replicas, and the same norms everywhere."""
        for param in model.parameters():
            local = to_local(param).detach()
            there = [torch.empty_like(local) for _ in range(2)]
            distributed.all_gather(there, local, group=self.replicas)
            assert torch.equal(*there)
        said: list[Any] = [None] * 4
        distributed.all_gather_object(said, norms)
        assert said == [norms] * 4


def assert_near(model: Net, other: Net) -> None:
    """Sums of float32 in another order."""
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (full(one) - full(two)).abs().max() <= 1e-5 * full(two).abs().max()


def trains(rank: int) -> None:
    """Any format: replicas stay equal; float32 equals one process with all micro-batches."""
    job = Job(rank)
    for state_dtype, windows in (("float32", 6), ("int8", 6), ("int4", 50)):
        model, accumulator = job.build(flora, state_dtype=state_dtype, check_replicas_every=5)
        start = full(model.first.weight).clone()
        norms = job.go(model, accumulator, range(windows * STEPS), [rank])
        assert len(norms) == windows
        job.assert_alike(model, norms)
        assert (full(model.first.weight) - start).abs().max() > 1e-3, "and they have moved"
    job.assert_alike(*job.trained(deferred=True))
    _, accumulator = job.build(flora, deferred=True)
    # Each of the four rounds with bits of its own, so that their errors average out.
    assert {entry.unreduced._rank for entry in accumulator._entries if entry.unreduced is not None} == {rank}
    accumulator.close()
    for options in ({}, {"ratio": 2}, {"deferred": True}):
        found = job.build(sgd, state_dtype="float32", **options)
        norms = job.go(*found, range(6 * STEPS), [rank])
        whole = job.build(sgd, 4 * STEPS, shards=False, state_dtype="float32", **{**options, "deferred": False})
        assert norms == pytest.approx(job.go(*whole, range(6 * STEPS), range(4)), rel=1e-5)
        assert max(norms) > MAX_NORM, "it was clipped"
        assert_near(found[0], whole[0])


def scales(rank: int) -> None:
    """One row of one shard of one replica overflows: all skip the window."""
    job = Job(rank)
    for optimizer, release in ((flora, True), (lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2), False)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        model, accumulator = job.build(optimizer, scaler=scaler, release=release)
        found = []
        for window in range(3):
            before = full(model.second.weight).clone()
            for number in range(STEPS):
                overflow = torch.inf if (window, rank, number) == (1, 2, 0) else 0.0
                accumulator.backward(model(batch(STEPS * window + number, rank), overflow))
            accumulator.clip_grad_norm_(MAX_NORM)
            stepped = accumulator.step()
            scaler.update()
            found.append((stepped, scaler.get_scale(), torch.equal(before, full(model.second.weight))))
        assert found == [(True, 2.0**10, False), (False, 2.0**9, True), (True, 2.0**9, False)]
        job.assert_alike(model, [])


def resumes(rank: int) -> None:
    """Inside a window as without a stop; between windows with another number of replicas too."""
    job = Job(rank)
    whole, first, second = (job.build(flora) for _ in range(3))
    job.go(*whole, range(6), [rank])
    for stop in (4, 5):
        job.go(*first, range(stop - 4 and 4, stop), [rank])
        with torch.no_grad():
            for param, there in zip(second[0].parameters(), first[0].parameters(), strict=True):
                to_local(param).copy_(to_local(there))
        optimizers = [each[1]._entries._optimizers[0] for each in (first, second)]
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        saved = copy.deepcopy(first[1].state_dict())
        second[1].load_state_dict(saved)
        job.go(*second, range(stop, 6), [rank])
        for one, two in zip(whole[0].parameters(), second[0].parameters(), strict=True):
            assert torch.equal(to_local(one), to_local(two))
    saved["rank"] = [(rank + 1) % 4, 4]
    with pytest.raises(ValueError, match=f"is rank {(rank + 1) % 4}'s of 4, this is rank {rank} of 4"):
        second[1].load_state_dict(saved)

    two = job.build(sgd, state_dtype="float32")
    job.go(*two, range(4), [rank])
    one = job.build(sgd, 2 * STEPS, state_dtype="float32", process_group=job.alone)
    with torch.no_grad():
        for param, there in zip(one[0].parameters(), two[0].parameters(), strict=True):
            to_local(param).copy_(to_local(there))
    one[1].load_state_dict(two[1].state_dict())
    shard = rank % 2
    norms = job.go(*two, range(4, 8), [rank])
    assert norms == pytest.approx(job.go(*one, range(4, 8), [shard, 2 + shard]), rel=1e-5)
    assert_near(one[0], two[0])


def goes_on_or_stops(rank: int) -> None:
    """What happens to one process happens to all."""
    job = Job(rank)
    replica = rank // 2
    model, accumulator = job.build(sgd, state_dtype="float32", check_replicas_every=1)
    # Different numbers of micro-batches: the mean of all that there were.
    whole, other = job.build(sgd, 6, shards=False, state_dtype="float32")
    for number in range(STEPS - replica):
        accumulator.backward(model(batch(number, rank)))
    assert accumulator.flush()
    accumulator.step()
    for number, source in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)):
        other.backward(whole(batch(number, source)))
    other.step()
    assert_near(model, whole)

    # NaN in one replica: no rank steps.
    for number in range(STEPS):
        accumulator.backward(model(batch(number, rank), torch.nan if (rank, number) == (2, 1) else 0.0))
    assert not accumulator.grad_norm.isfinite()
    accumulator.zero_grad()
    norms = job.go(model, accumulator, range(STEPS), [rank])
    job.assert_alike(model, norms)

    # A process that drops a micro-batch which the holders of the other shards keep.
    with accumulator.micro_batch():
        if rank == 3:
            accumulator.drop_micro_batch()
        model(batch(0, rank)).backward()
    with pytest.raises(RuntimeError, match=r"kept: \[2, 1\]" if replica else r"ranks \[1\] of process_group"):
        accumulator.backward(model(batch(1, rank)))
    accumulator.zero_grad()

    # Weights that are not the same: on one rank in one element, and all ranks know.
    if rank == 3:
        with torch.no_grad():
            to_local(model.second.weight)[1, 5] += 1e-6
    with pytest.raises(RuntimeError, match="parameter 3 differs between the replicas in window 4"):
        job.go(model, accumulator, range(STEPS), [rank])
    accumulator.zero_grad()


@pytest.mark.parametrize("job", [trains, scales, resumes, goes_on_or_stops])
def test_four_processes(worlds: Worlds, job: Callable[[int], None]) -> None:
    """Two replicas of two shards; see each function."""
    worlds(4).run(job)
