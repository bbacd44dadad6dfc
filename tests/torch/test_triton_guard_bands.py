"""The Triton kernels touch no memory but what they were given, in random cases, at any alignment.

Every load and store of the interpreter is held against the tensors, the table and the workspace of its launch; bands
around the tensors keep their bytes.
"""

import random

import pytest
import torch

from floragrad import Flora
from floragrad.policy import plan_accumulator
from floragrad.torch.accumulation.sketch import GradientSketch
from tests.torch.interpreter import accesses, use_triton
from tests.torch.test_guard_bands import STATE_DTYPES, Banded, options_of, random_shape

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def step_in_bands(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, options, dtype = random_shape(rng), options_of(rng), rng.choice(DTYPES)
    options |= {"scale_parameter": rng.choice([True, False]), "weight_decay": rng.choice([0.0, 0.1])}
    bands, generator = Banded(rng), torch.Generator().manual_seed(rng.randrange(2**31))
    param = torch.nn.Parameter(bands.copy(torch.randn(shape, generator=generator).to(dtype)))
    optimizer = Flora([param], **options)
    state = optimizer.state[param]
    for key, value in list(state.items()):
        if key not in ("step", "tensor_id"):
            state[key] = bands.copy(value)
    for _ in range(2):  # the second resamples
        grad = torch.randn(shape, generator=generator).to(dtype)
        param.grad = bands.copy(grad)
        tensors = {key: value for key, value in state.items() if key not in ("step", "tensor_id")}
        with accesses({"param": param.detach(), "grad": param.grad, **tensors}, monkeypatch):
            optimizer.step()
        assert torch.equal(param.grad, grad)
    assert bands.are_whole(), (shape, dtype, options)
    assert param.isfinite().all(), (shape, dtype, options)


def fold_in_bands(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, dtype = random_shape(rng), rng.choice(DTYPES)
    plan = plan_accumulator(shape, ratio=rng.randint(1, 7), state_dtype=rng.choice(STATE_DTYPES), kind="matrix")
    bands, sketch = Banded(rng), GradientSketch(plan, "sign", 0, 0, torch.device("cpu"))
    for key, value in list(sketch.buffers.items()):
        sketch.buffers[key] = bands.copy(value)
    given = bands.copy(torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**31))).to(dtype))
    with accesses({"grad": given, **sketch.buffers}, monkeypatch):
        for _ in range(2):
            sketch.add(given, 0.5, 0, measure_noise=True)
        sketch.decode_into(given, 0, 0.5, 1.0)
    assert bands.are_whole(), (shape, dtype, plan)
    assert given.isfinite().all(), (shape, dtype, plan)


def run(steps: int, folds: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch)
    rng = random.Random(seed)
    for _ in range(steps):
        step_in_bands(rng, monkeypatch)
    for _ in range(folds):
        fold_in_bands(rng, monkeypatch)


def test_kernels_stay_in_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    run(10, 5, 0, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_kernels_stay_in_their_tensors_in_2000_cases(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run(75, 25, seed, monkeypatch)
