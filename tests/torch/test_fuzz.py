"""Random tensors and options against the float64 oracle: 300 cases here, 2,000 in ``make test-slow``.

Tolerance, in units of 2⁻²⁴ (half of float32's epsilon). Gradients are given, so errors do not feed back. In each step a
parameter is rounded once where it moves and three times more where it decays, by at most max|W|; and the direction,
which is made of U and of averages of it, (2m + 2n + 2ρ + 40) times relative to the larger of max|U| and max|D|: sums
over rows, columns, means and the norm, two for each of ρ columns of a bucket, and single operations. A Gaussian P adds
sums over n and k. D itself may be as small as (1 − β₁) U, so its own size is no measure.

A momentum in few bits is off by at most a step of its grid, s, each time it is stored, and by β₁ of what it was off
before. What it adds to D is off by as much (unbiased: times ρ), and clipping, by 1 + max|D| / threshold of that.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from floragrad import Flora
from floragrad.torch.backends.cpu import library
from tests.torch.cases import Case
from tests.torch.conftest import use
from tests.torch.oracle import reference_trajectory

UNIT, STEPS, LR = 2.0**-24, 4, 1e-2
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 0.0}
"""Half of the distance between neighbours, of the dtypes of parameters; twice that where they are rounded at random."""

pytestmark = pytest.mark.filterwarnings("ignore:Flora compresses no momentum")


@dataclass(frozen=True)
class Draw:
    """One random case: the tensor, its options, how gradients lie, and the code that steps it."""

    case: Case
    dtype: torch.dtype
    layout: str
    code: str
    scale: float

    def __str__(self) -> str:
        return f"{self.case.shape} {self.case.options} {self.dtype} {self.layout} {self.code} {self.scale:.1e}"


def drawn(seed: int) -> Draw:
    source = random.Random(seed)
    rank = source.choice([0, 1, 2, 2, 2, 2, 3, 4])
    shape = tuple(source.choice([1, 2, 3, 7, 16, 33, 70]) for _ in range(rank))
    while len(shape) > 2 and torch.Size(shape).numel() > 4000:
        shape = shape[1:]
    projection = source.choice(["sign", "sign", "adaptive", "gaussian"])
    residual = projection == "adaptive" or (projection == "sign" and source.random() < 0.6)
    # A Gaussian P spreads what storage rounds over a row; learnt weights depend on it when projections are resampled.
    kept = ["float32", "float32", "bfloat16", "int8", "int4"]
    storage = "float32" if projection == "gaussian" else source.choice(kept)
    options: dict[str, Any] = {
        "lr": LR,
        "ratio": source.choice([1, 2, 3, 8, 100]),
        "projection": projection,
        "residual": residual,
        "state_dtype": storage,
        "kappa": 1000 if projection == "adaptive" else source.choice([1, 2, 1000]),
        "embedding_momentum": source.choice(["none", "full", "compressed"]),
        "beta1": source.choice([None, 0.5, 0.9, 0.99, 0.9999, 0.999999]),
        "weight_decay": source.choice([0.0, 0.0, 0.1, 10.0]),
        "clip_threshold": source.choice([0.1, 1.0, 1.0, float("inf")]),
        "factorize_second_moment": source.random() < 0.8,
        "maximize": source.random() < 0.2,
        "scale_parameter": False,
    }
    dtype = source.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
    return Draw(
        Case(str(seed), shape, options),
        dtype,
        source.choice(["contiguous", "contiguous", "transposed", "strided"]),
        source.choice(["eager", *library.instruction_sets()]),
        10 ** source.uniform(-3, 3),
    )


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides."""
    if values.dim() == 0 or layout == "contiguous":
        return values.clone()
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    wide = values.new_zeros((*values.shape[:-1], 2 * values.shape[-1]))
    wide[..., ::2] = values
    return wide[..., ::2]


def grid_step(state: dict[str, Tensor]) -> float:
    """What a stored number may be off by: a step of the coarsest block; two neighbours' distance in bfloat16."""
    if "exp_avg_scale" in state and state["exp_avg_scale"].numel():
        return float(state["exp_avg_scale"].max())
    kept = state.get("exp_avg")
    return float(kept.abs().max()) * 2.0**-7 if kept is not None and kept.dtype == torch.bfloat16 else 0.0


def assert_equals_the_oracle(draw: Draw) -> None:
    case, options = draw.case, draw.case.options
    gradients = [(grad * draw.scale).to(draw.dtype) for grad in case.gradients(STEPS)]
    param = torch.nn.Parameter(laid_out(case.parameter(draw.dtype).detach(), draw.layout))
    optimizer = Flora([param], **options)
    expected = reference_trajectory(case, gradients, draw.dtype)
    unclipped = {"beta1": None, "clip_threshold": float("inf"), "weight_decay": 0.0}
    size = reference_trajectory(case, gradients, draw.dtype, **unclipped)
    before = double(case.parameter(draw.dtype)).reshape(expected[0].shape)
    plan = optimizer.report().rows[0]
    m, n = (1, max(1, param.numel())) if plan.view is None else plan.view[1:]
    rho, beta1 = plan.ratio, options["beta1"] or 0.0
    count = 2 * m + 2 * n + 2 * rho + 40 + (2 * n if options["projection"] == "gaussian" else 0)
    is_paper = not options["residual"] and plan.momentum == "sketch"
    decoded, threshold = (rho if is_paper else 1), options["clip_threshold"]
    bound = off = 0.0
    previous, plain = before, before
    largest = np.abs(before).max(initial=0)
    decay = 1 - LR * options["weight_decay"]
    for step, grad in enumerate(gradients):
        param.grad = laid_out(grad, draw.layout)
        optimizer.step()
        off = beta1 * off * decoded + grid_step(optimizer.state[param])
        oracle = expected[step]
        moved = np.abs(oracle - decay * previous).max(initial=0)
        largest = max(largest, np.abs(oracle).max(initial=0))
        update = np.abs(size[step] - plain).max(initial=0)
        spread = (n + m) ** 0.5 if options["projection"] == "gaussian" and plan.momentum == "sketch" else 1.0
        stored = decoded * off * (LR + moved / threshold)
        rounding = EPS[draw.dtype] * (2 if draw.dtype == torch.bfloat16 else 1) + 4 * UNIT
        bound += rounding * largest + UNIT * count * spread * max(moved, update) * (1 + decoded) + stored
        error = np.abs(double(param).reshape(oracle.shape) - oracle).max(initial=0)
        assert error <= bound, f"step {step + 1}: {error:.2e} > {bound:.2e}"
        previous, plain = oracle, size[step]


def double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def fuzz(first: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = []
    for seed in range(first, first + count):
        draw = drawn(seed)
        with monkeypatch.context() as patch:
            use(draw.code, patch)
            try:
                assert_equals_the_oracle(draw)
            except AssertionError as error:
                wrong.append(f"{seed}: {draw}: {error}")
        library._found.cache_clear()
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_cases_equal_the_oracle(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz(first, 50, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(300, 2000, 100))
def test_more_random_cases_equal_the_oracle(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz(first, 100, monkeypatch)
