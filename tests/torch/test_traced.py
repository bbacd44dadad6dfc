"""Under ``torch.compile`` the optimizer and the accumulator break the graph, and do what they do without."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from floragrad import Flora, GradientAccumulator

Build = Callable[[torch.nn.Module], Callable[[Tensor], Any]]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole_step(model: torch.nn.Module) -> Callable[[Tensor], Any]:
    optimizer = Flora(model.parameters(), lr=1e-2, rank=8)

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def layer_by_layer(model: torch.nn.Module) -> Callable[[Tensor], Any]:
    optimizer = Flora(model.parameters(), lr=1e-2, rank=8)

    def step(batch: Tensor) -> int:
        model(batch).square().mean().backward()
        for param in model.parameters():
            optimizer.step_parameter(param)
            param.grad = None
        return len(optimizer.report().rows)

    return step


def accumulated(model: torch.nn.Module) -> Callable[[Tensor], Any]:
    accumulator = GradientAccumulator(Flora(model.parameters(), lr=1e-2, rank=8), steps=2)

    def step(batch: Tensor) -> Tensor:
        for half in batch.split(4):
            accumulator.backward(model(half).square().mean())
        norm = accumulator.clip_grad_norm_(1.0)
        accumulator.step()
        return norm

    return step


def in_a_micro_batch(model: torch.nn.Module) -> Callable[[Tensor], Any]:
    accumulator = GradientAccumulator(torch.optim.SGD(model.parameters(), lr=1e-2), steps=2)

    def step(batch: Tensor) -> Tensor:
        for half in batch.split(4):
            with accumulator.micro_batch():
                model(half).square().mean().backward()
        norm = accumulator.grad_norm
        accumulator.step()
        return norm

    return step


def trained(build: Build, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> list[Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Tanh(), torch.nn.Linear(48, 32))
    step = wrap(build(model))
    for seed in range(3):
        step(torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)))
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("build", [whole_step, layer_by_layer, accumulated, in_a_micro_batch])
def test_a_compiled_train_step_is_the_uncompiled_one(build: Build, backend: str) -> None:
    """To the rounding of a backward pass whose operations another tracer put in order."""
    expected = trained(build, lambda step: step)
    found = trained(build, lambda step: torch.compile(step, backend=backend))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("native", [True, False], ids=["native", "eager"])
def test_a_compiled_optimizer_step_is_the_uncompiled_one(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from floragrad.torch.backends.cpu import library

    library._found.cache_clear()
    monkeypatch.setenv(library.SWITCH, "auto" if native else "eager")
    results = []
    for compiled in (False, True):
        param = torch.nn.Parameter(torch.ones(64, 64))
        optimizer = Flora([param], lr=1e-2, rank=8)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for seed in range(3):
            param.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
            step()
        assert optimizer.state[param]["step"] == 3
        results.append(param.detach())
    library._found.cache_clear()
    assert torch.equal(*results)
