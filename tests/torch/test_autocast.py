"""Under autocast around a step all is computed in float32: its products would else be rounded to 8 bits."""

from contextlib import nullcontext

import pytest
import torch

from floragrad import Flora, GradientAccumulator
from floragrad.torch.projection import without_autocast
from tests.torch.cases import CASES, Case

CHOSEN = [case for case in CASES if case.name in ("gaussian", "gaussian-experts", "adaptive", "ratio-2", "vector")]


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("code", ["eager", "baseline"], indirect=True)
@pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_steps(case: Case, code: str, one_by_one: bool) -> None:
    """Bit for bit, over a resampling."""
    made = []
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        param = case.parameter()
        optimizer = Flora([param], **case.all_options(kappa=2))
        for grad in case.gradients(4):
            param.grad = grad
            with context:
                optimizer.step_parameter(param) if one_by_one else optimizer.step()
        made.append(param.detach())
    assert torch.equal(*made)


@pytest.mark.parametrize("projection", ["sign", "gaussian"])
def test_accumulation(projection: str) -> None:
    """Folds, the norm and what is decoded; the forward pass is the caller's, and here of products alone."""
    made = []
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.zeros(64, 96))
        optimizer = Flora([param], lr=1e-2, rank=16)
        with context, GradientAccumulator(optimizer, 2, ratio=4, projection=projection, clip=True) as accumulator:
            for _ in range(2):
                accumulator.backward((param * torch.randn(64, 96, generator=generator)).sum())
            norm = accumulator.clip_grad_norm_(1.0)
            accumulator.step()
        made.append((norm, param.detach()))
    assert all(map(torch.equal, *made))


def test_a_closure_keeps_the_callers_autocast() -> None:
    """It is the forward pass."""
    param = torch.nn.Parameter(torch.ones(24, 40))
    optimizer = Flora([param], lr=1e-2, ratio=4, projection="gaussian", state_dtype="float32")
    seen = []

    def closure() -> float:
        loss = (param @ torch.ones(40, 3)).float().sum()
        seen.append((param @ torch.ones(40, 3)).dtype)
        loss.backward()
        return loss.item()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(closure)
        assert (param @ torch.ones(40, 3)).dtype == torch.bfloat16
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("kind", ["cpu", "meta", "cuda"])
def test_every_device_type_is_asked(kind: str) -> None:
    """Of one that has no autocast there is nothing to turn off."""
    with without_autocast(torch.device(kind)):
        assert not torch.is_autocast_enabled("cpu")
