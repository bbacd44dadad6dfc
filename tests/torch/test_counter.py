"""Steps are counted exactly, beyond the integers that float32 has."""

import itertools

import pytest
import torch

from floragrad import Flora
from tests.torch.conftest import code as code

FAR = (2**24, 2**31 - 1, 2**33, 2**53 + 1)


def at_step(step: int, dtype: torch.dtype = torch.float32, **options: object) -> tuple[torch.nn.Parameter, Flora]:
    param = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
    optimizer = Flora([param], **{"rank": 8, "lr": 1e-3, **options})  # type: ignore[arg-type]
    optimizer.state[param]["step"].fill_(step)
    return param, optimizer


@pytest.mark.parametrize("step", FAR)
@pytest.mark.parametrize("kappa", [1, 3, 1000])
def test_the_next_step_is_the_next_integer(step: int, kappa: int) -> None:
    """Its projection's number, whether it resamples, and the decay of the second moment follow from it."""
    param, optimizer = at_step(step, kappa=kappa)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["step"].item() == step + 1
    at = optimizer._begin_step(param, *optimizer._validated(param)).ctx
    assert (at.step, at.resample_index, at.is_resample_step) == (step + 2, (step + 2) // kappa, (step + 2) % kappa == 0)
    assert 1 - at.beta2 == pytest.approx(float(step + 2) ** -0.8, rel=1e-6)


@pytest.mark.parametrize("step", FAR)
def test_rounding_bits_do_not_repeat(step: int, code: str) -> None:
    """Steps of an ulp's sixteenth: with new bits (15/16)**96 = 0.2% of the numbers stay; with the same ones 94%."""
    ulp = 2.0**-8  # below 1
    param, optimizer = at_step(step, torch.bfloat16, lr=ulp / 16, beta1=None)
    for _ in range(96):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert (param == 1).float().mean() < 0.02


@pytest.mark.parametrize("step", FAR)
def test_projections_are_still_resampled(step: int, code: str) -> None:
    """The momentum of a constant gradient is carried over: what it says differs from sketch to sketch."""
    step -= step % 4
    param, optimizer = at_step(step, kappa=4, state_dtype="float32", beta1=0.5)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(64, 64, generator=generator)
    sketches = []
    for _ in range(8):
        param.grad = grad.clone()
        optimizer.step()
        sketches.append(optimizer.state[param]["exp_avg"].clone())
    changed = [
        float((after - before).norm() / before.norm()) > 0.5 for before, after in itertools.pairwise(sketches[2:])
    ]
    assert changed == [True, False, False, False, True], "at steps 4 and 8, where t is a multiple of kappa"
