"""What several devices add and take."""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from typing import Any

import pytest
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from floragrad.cli.plan.distributed import bucket_bytes
from floragrad.cli.plan.engine import plan_subject
from floragrad.cli.plan.result import OptimizerPlan, PlanSettings
from floragrad.cli.plan.tracker import MemoryTracker
from tests.cli.plan.engine_cases import SMALL, subject


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_buckets_are_those_of_ddp() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 8))
    model[0].bias.requires_grad_(False)
    with MemoryTracker() as memory:
        wrapped = DistributedDataParallel(model)
        made = memory.live
        assert wrapped is not None
    assert bucket_bytes(model) <= made <= bucket_bytes(model) + 256, "and some counters"
    assert bucket_bytes(model) == 4 * (64 * 96 + 96 * 8 + 8)


def row(settings: PlanSettings) -> OptimizerPlan:
    return plan_subject(subject("llama", 3), settings).optimizers["flora"]


def test_ddp_adds_a_copy_of_the_gradients() -> None:
    settings = replace(SMALL, optimizers=("flora",))
    alone, beside = row(settings), row(replace(settings, ddp=4))
    assert beside.buckets == beside.gradients == alone.gradients
    assert beside.peak == alone.peak + alone.gradients


def test_fsdp_shares_what_lasts() -> None:
    settings = replace(SMALL, optimizers=("flora",), dtype="bfloat16")
    alone, shared = row(settings), row(replace(settings, fsdp=4))
    for category in ("parameters", "optimizer_state", "gradients"):
        quarter = getattr(alone, category) / 4
        assert quarter <= getattr(shared, category) <= 1.02 * quarter + 1
    assert shared.activations == alone.activations
    assert shared.buckets > 0


ROWS = ("flora", "flora+accumulator", "flora+release")


def rows(**settings: Any) -> dict[str, OptimizerPlan]:
    planned = plan_subject(subject("llama", 3), replace(SMALL, optimizers=ROWS, accumulate=4, **settings))
    for name, reason in planned.unavailable.items():
        assert name == "flora+release"
        assert "updates inside the backward pass, before gradients are averaged: plan flora+accumulator" in reason
    return dict(planned.optimizers)


def test_the_accumulator_on_several_devices() -> None:
    """Sketches are summed in place of gradients between replicas, and folded from shards by FSDP2."""
    alone, beside, shared, deferred = rows(), rows(ddp=4), rows(fsdp=4), rows(fsdp=4, defer_reduction=True)
    assert alone.keys() == shared.keys() == {*ROWS}
    assert beside.keys() == deferred.keys() == {"flora", "flora+accumulator"}
    gradients, sketches = alone["flora"].gradients, alone["flora+accumulator"].accumulation
    assert all(row.sent == 0 for row in alone.values())

    assert beside["flora"].sent == ceil(2 * 3 / 4 * gradients)
    assert beside["flora+accumulator"].sent == ceil(2 * 3 / 4 * sketches)
    assert beside["flora+accumulator"].buckets == 4 * sketches, "messages, and no buckets"
    assert beside["flora+accumulator"].accumulation == sketches

    assert {row.sent for row in shared.values()} == {4 * 3 * gradients // 4}
    quarter = shared["flora+accumulator"].accumulation
    assert sketches / 4 <= quarter <= 1.02 * sketches / 4 + 1

    assert deferred["flora"].sent == 3 * gradients // 4
    assert deferred["flora"].gradients == gradients, "whole, between the micro-batches"
    assert deferred["flora+accumulator"].sent == ceil(3 * sketches / 4)
    assert deferred["flora+accumulator"].accumulation == sketches + quarter
    assert deferred["flora+accumulator"].peak < deferred["flora"].peak


def test_a_module_without_gradients_has_no_buckets() -> None:
    assert bucket_bytes(nn.Linear(2, 2).requires_grad_(False)) == 0
