"""The kernels touch no memory but their tensors: bands around each keep their bytes, and change no result."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from floragrad import Flora
from floragrad.policy import plan_accumulator
from floragrad.torch.accumulation.sketch import GradientSketch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SENTINEL = 0xA5
STATE_DTYPES = ["float32", "bfloat16", "int8", "int4"]
CASES = 60


class Banded:
    """Tensors copied into the middle of larger storages, at any alignment that their dtype allows."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._bands: list[tuple[Tensor, Tensor]] = []

    def copy(self, tensor: Tensor) -> Tensor:
        first, last = (4 * self._rng.randint(16, 48) for _ in range(2))
        storage = torch.full((first + tensor.nbytes + last,), SENTINEL, dtype=torch.uint8)
        inner = storage[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._bands += [(storage, storage[:first]), (storage, storage[first + tensor.nbytes :])]
        return inner.copy_(tensor)

    def are_whole(self) -> bool:
        return all(bool((band == SENTINEL).all()) for _, band in self._bands)


def random_shape(rng: random.Random) -> tuple[int, ...]:
    """Rows and columns about the lanes of registers and the blocks of 64, seldom multiples of them."""
    columns = rng.choice([rng.randint(1, 20), rng.randint(60, 70), rng.randint(120, 200), 64, 128])
    kind = rng.random()
    if kind < 0.15:
        return (columns,)
    return (2, rng.randint(1, 9), max(columns, 32)) if kind < 0.3 else (rng.randint(1, 40), columns)


def options_of(rng: random.Random) -> dict[str, Any]:
    projection = rng.choice(["sign", "sign", "adaptive"])
    return {
        "lr": 1e-2,
        "ratio": rng.randint(1, 7),
        "kappa": 2,
        "projection": projection,
        "residual": True if projection == "adaptive" else rng.choice([True, False]),
        "state_dtype": rng.choice(STATE_DTYPES),
        "factorize_second_moment": rng.choice([True, True, False]),
        "beta1": rng.choice([0.9, 0.9, None]),
        "embedding_momentum": "compressed",
        "stochastic_rounding": rng.choice([True, False]),
    }


@pytest.mark.parametrize("seed", range(3))
def test_steps_stay_in_their_tensors(seed: int, build: str) -> None:
    rng = random.Random(seed)
    for _ in range(CASES):
        shape, options = random_shape(rng), options_of(rng)
        dtype = rng.choice([torch.float32, torch.bfloat16])
        bands, generator = Banded(rng), torch.Generator().manual_seed(rng.randrange(2**31))
        start = torch.randn(shape, generator=generator).to(dtype)
        plain, banded = torch.nn.Parameter(start.clone()), torch.nn.Parameter(bands.copy(start))
        optimizers = [Flora([param], **options) for param in (plain, banded)]
        assert optimizers[0].report().rows[0].path.startswith("native")
        state = optimizers[1].state[banded]
        for key, value in list(state.items()):
            if value.dim() or key not in ("step", "tensor_id"):
                state[key] = bands.copy(value)
        for _ in range(3):
            grad = torch.randn(shape, generator=generator).to(dtype)
            plain.grad, banded.grad = grad.clone(), bands.copy(grad)
            for optimizer in optimizers:
                optimizer.step()
            assert torch.equal(banded.grad, grad)
        assert bands.are_whole(), (shape, dtype, options)
        assert torch.equal(banded, plain), (shape, dtype, options)
        for key, value in optimizers[0].state[plain].items():
            assert torch.equal(state[key], value), (key, shape, dtype, options)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_folds_stay_in_their_tensors(state_dtype: Any, build: str) -> None:
    rng = random.Random(0)
    for _ in range(CASES):
        shape, dtype = random_shape(rng), rng.choice([torch.float32, torch.bfloat16])
        plan = plan_accumulator(shape, ratio=rng.randint(1, 7), state_dtype=state_dtype, kind="matrix")
        bands, generator = Banded(rng), torch.Generator().manual_seed(rng.randrange(2**31))
        sketches = [GradientSketch(plan, "sign", 0, 0, torch.device("cpu")) for _ in range(2)]
        buffers = sketches[1].buffers
        for key, value in list(buffers.items()):
            buffers[key] = bands.copy(value)
        for window in range(2):
            for sketch in sketches:
                sketch.folds = 0
            for _ in range(2):
                grad = torch.randn(shape, generator=generator).to(dtype)
                given = bands.copy(grad)
                sketches[0].add(grad, 0.5, window, measure_noise=True)
                sketches[1].add(given, 0.5, window, measure_noise=True)
                assert torch.equal(given, grad)
            decoded = [torch.empty(shape), bands.copy(torch.empty(shape).zero_())]
            for sketch, into in zip(sketches, decoded, strict=True):
                sketch.decode_into(into, window, 0.0, 1.0)
            assert torch.equal(*decoded)
        assert bands.are_whole(), (shape, dtype)
        for key, value in sketches[0].buffers.items():
            assert torch.equal(buffers[key], value)
