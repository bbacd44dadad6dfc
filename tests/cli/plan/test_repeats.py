"""The work on a tensor, traced on a few of its blocks of rows, is that of the whole tensor, block by block."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from floragrad import Flora, GradientAccumulator
from floragrad.cli.plan.repeats import repeated_work
from floragrad.cli.plan.tracker import MemoryTracker, Moment, joined

# Many blocks of rows each, the last one short; matrices, a batch of them, and a convolution.
LARGE = [(4100, 768), (2, 3000, 520), (5000, 64, 3, 3)]


def step(shape: tuple[int, ...], state_dtype: str, dtype: torch.dtype) -> Callable[[], None]:
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = Flora([{"params": [param], "kind": "matrix"}], lr=1e-3, rank=32, state_dtype=state_dtype)
    param.grad = torch.zeros(shape, dtype=dtype)
    return optimizer.step


def window(shape: tuple[int, ...], state_dtype: str, dtype: torch.dtype) -> Callable[[], None]:
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = Flora([{"params": [param], "kind": "matrix"}], lr=1e-3, rank=32)
    accumulator = GradientAccumulator(optimizer, 2, state_dtype=state_dtype, clip=True)

    def work() -> None:
        for _ in range(2):
            accumulator.backward((param * 1.0).sum())
        accumulator.clip_grad_norm_(1.0)
        accumulator.step()

    return work


def lived(work: Callable[[], None], *, repeated: bool) -> Moment:
    tracker = MemoryTracker()
    if repeated:
        with repeated_work(tracker, {}), tracker:
            work()
    else:
        with tracker:
            work()
    return joined(tracker.cut(), "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("shape", LARGE, ids=lambda shape: "x".join(map(str, shape)))
def test_an_update_is_counted_to_the_byte(shape: tuple[int, ...], state_dtype: str, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        found, whole = (lived(step(shape, state_dtype, dtype), repeated=on) for on in (True, False))
    assert sum(found.peak) == sum(whole.peak)
    assert 0 < sum(whole.peak) < 4 * torch.Size(shape).numel() / 2, "nothing as large as the tensor is held"


@pytest.mark.parametrize("state_dtype", ["float32", "int4"])
@pytest.mark.parametrize("shape", LARGE[:2], ids=lambda shape: "x".join(map(str, shape)))
def test_a_window_is_counted_to_the_byte(shape: tuple[int, ...], state_dtype: str) -> None:
    with FakeTensorMode():
        found, whole = (lived(window(shape, state_dtype, torch.float32), repeated=on) for on in (True, False))
    assert sum(found.peak) == sum(whole.peak)


def test_the_code_is_as_it_was_afterwards() -> None:
    tracker = MemoryTracker()
    before = Flora.step_parameter, GradientAccumulator.backward
    param = nn.Parameter(torch.ones(64, 64))
    optimizer = Flora([param], lr=1e-3, rank=8)
    with repeated_work(tracker, {}):
        pass
    param.grad = torch.ones(64, 64)
    optimizer.step()
    assert (Flora.step_parameter, GradientAccumulator.backward) == before
    assert not torch.equal(param, torch.ones(64, 64)), "updates are done again"
