"""Small tensors are stepped together: to the same numbers as alone, in far fewer operations."""

from typing import Any

import pytest
import torch

from floragrad import Flora
from floragrad.torch import vectors
from tests.torch.test_traffic import Traffic

pytestmark = [pytest.mark.usefixtures("eager"), pytest.mark.filterwarnings("ignore:Flora compresses no momentum")]

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"weight_decay": 0.1},
    "relative": {"lr": None, "relative_step": True, "scale_parameter": True, "weight_decay": 0.1},
    "no-momentum": {"beta1": None},
    "tensor-lr": {"lr": torch.tensor([1e-2])},
    "clipped": {"clip_threshold": 0.1},
}
SHAPES = ((7,), (64,), (1,), (), (300,), (12, 16), (0,))


def made(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_together_is_as_alone(dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In every bit of parameters and state, whatever is in a group, and however many fit into a batch."""
    monkeypatch.setattr(vectors, "BLOCK_ELEMENTS", 100)
    together, alone = made(dtype), made(dtype)
    groups = [{"params": together[:3]}, {"params": together[3:], "eps": (1e-20, 1e-2)}]
    first = Flora(groups, **{"lr": 1e-2, "rank": 4, **options})
    groups = [{"params": alone[:3]}, {"params": alone[3:], "eps": (1e-20, 1e-2)}]
    second = Flora(groups, **{"lr": 1e-2, "rank": 4, **options})
    for step in range(3):
        for one, other in zip(together, alone, strict=True):
            if step or one.numel() != 64:  # one of them is a step behind
                one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
                other.grad = one.grad.clone()
        first.step()
        for other in alone:
            if other.grad is not None:
                second.step_parameter(other)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)
        assert first.state[one].keys() == second.state[other].keys()
        assert all(torch.equal(value, second.state[other][key]) for key, value in first.state[one].items())


def test_many_take_few_operations() -> None:
    """Four for each, to count its step and apply its update; all else is done once for all."""
    launches = {}
    for count in (1, 50):
        params = made(torch.float32, ((32,),) * count)
        optimizer = Flora(params, lr=1e-2)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        with Traffic() as traffic:
            optimizer.step()
        launches[count] = traffic.launches
    assert launches[50] - launches[1] <= 49 * 4


def test_large_ones_are_stepped_alone() -> None:
    """What is held meanwhile is bounded by a block, not by all that have no matrix view."""
    param = torch.nn.Parameter(torch.zeros(vectors.WHOLE_ELEMENTS + 1))
    param.grad = torch.ones_like(param)
    optimizer = Flora([param], lr=1e-2)
    vector = optimizer._begin_step(param, *optimizer._checked(param))
    assert not vectors.steps_with_others(vector)
    large = vectors.BLOCK_ELEMENTS
    sizes = [100, 100, large, 100]
    few = [vector._replace(param=torch.empty(size, device="meta")) for size in sizes]
    batches = [[one.param.numel() for one in batch] for batch in vectors._batches(few)]
    assert batches == [[100, 100], [large], [100]]
