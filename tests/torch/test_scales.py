"""Gradients of any size, with rows and columns of zeros, give the float64 oracle's numbers.

Tolerance: that of ``test_parity.py`` for given gradients, from parameters of zero: (2m + 2n + 20) roundings of the way
that the parameter has gone, on one side only. Sketches add a sum over ρ columns and four operations: 2ρ + 8.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from floragrad import Flora
from tests.torch.cases import Case
from tests.torch.oracle import reference_trajectory, trajectory

UNIT = 2.0**-24
SHAPE, STEPS = (12, 20), 3
LARGEST = 2.0**48
"""Root mean square up to which all is exact: ``update.LARGEST_MEAN`` is its square."""


class Zeros(Case):
    """Parameters that start at zero: what they become is what they have moved."""

    def parameter(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.zeros(self.shape, dtype=dtype))


CASES = [
    Zeros("sketch", SHAPE, {"ratio": 2}),
    Zeros("paper", SHAPE, {"ratio": 2, "residual": False}),
    Zeros("adaptive", SHAPE, {"ratio": 2, "projection": "adaptive"}),
    Zeros("gaussian", SHAPE, {"ratio": 2, "projection": "gaussian"}),
    Zeros("whole", SHAPE, {"ratio": 1}),
    Zeros("none", SHAPE, {"ratio": 2, "beta1": None}),
    Zeros("clipped", SHAPE, {"ratio": 2, "clip_threshold": 0.1}),
    Zeros("full-second-moment", SHAPE, {"ratio": 2, "factorize_second_moment": False}),
    Zeros("experts", (2, 6, 10), {"ratio": 2}),
    Zeros("vector", (40,)),
]

MATRICES = [case for case in CASES if len(case.shape) > 1]

pytestmark = [
    pytest.mark.usefixtures("code"),
    pytest.mark.filterwarnings("ignore:Flora compresses no momentum"),
]
RUNS = settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def assert_equals_the_oracle(case: Case, gradients: list[torch.Tensor]) -> None:
    found, expected = trajectory(case, gradients), reference_trajectory(case, gradients)
    m, n = (1, case.shape[-1]) if len(case.shape) < 2 else case.shape[-2:]
    path = [np.zeros_like(expected[0]), *expected]
    way = np.cumsum([np.abs(after - before).max() for before, after in pairwise(path)])
    for step, (ours, oracle) in enumerate(zip(found, expected, strict=True)):
        error = np.abs(ours.reshape(oracle.shape) - oracle).max()
        bound = 2 * UNIT * (2 * m + 2 * n + 2 * 2 + 28) * way[step]
        assert error <= bound, f"{case}, step {step + 1}: {error:.2e} > {bound:.2e}"


def dead(shape: tuple[int, ...], axis: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Zeros for some rows or columns, ones for the others."""
    size = [1] * len(shape)
    size[axis] = shape[axis]
    return (torch.rand(size, generator=generator) >= share).float()


def gradients(shape: tuple[int, ...], seed: int, scales: list[float], zeros: tuple[float, float]) -> list[torch.Tensor]:
    """A gradient for each scale; a unit that is dead in the first may not be in the next."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for scale in scales:
        grad = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        for axis, share in zip((-2, -1), zeros, strict=True):
            if len(shape) >= -axis:
                grad = grad * dead(shape, axis, share, generator)
        made.append(grad.float())
    return made


# Zeros of a row, as of a ReLU whose unit is dead; of a column, as of an input that is always zero; of all.
SHARES = st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.0, 0.3]))


@pytest.mark.parametrize("case", CASES, ids=str)
@RUNS
@given(
    seed=st.integers(0, 2**20),
    exponent=st.floats(-38, 14),
    drift=st.lists(st.floats(-3, 0), min_size=STEPS, max_size=STEPS),
    zeros=SHARES,
)
def test_every_scale_equals_the_oracle(
    case: Case, seed: int, exponent: float, drift: list[float], zeros: tuple[float, float]
) -> None:
    """From 1e-38, where squares are zero beside ε₁, to 1e14; denormals are among them.

    What ``"adaptive"`` learns from is products of three numbers of U, which are nothing below 1e-15 / 1e15.
    """
    if case.name == "adaptive":
        exponent = max(exponent, -27)
    assert_equals_the_oracle(case, gradients(case.shape, seed, [10 ** (exponent + each) for each in drift], zeros))


@pytest.mark.parametrize("case", MATRICES, ids=str)
def test_a_dead_unit_beside_a_summed_loss(case: Case) -> None:
    """One row of zeros beside a root mean square of 1e4, 1e8 and 1e14: its factor's square is beyond float32."""
    for scale in (1e4, 1e8, 1e14):
        grads = gradients(case.shape, 0, [scale] * STEPS, (0.0, 0.0))
        for grad in grads:
            grad[..., 3, :] = 0
        assert_equals_the_oracle(case, grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_dead_unit_of_half_precision(dtype: torch.dtype) -> None:
    """As unscaled float16 gradients are; the first move is the oracle's, rounded to the nearest."""
    case = CASES[0]
    (grad,) = (each.to(dtype) for each in gradients(case.shape, 0, [2e4], (0.3, 0.0)))
    param = case.parameter(dtype)
    optimizer = Flora([param], **case.all_options(stochastic_rounding=False))
    param.grad = grad
    optimizer.step()
    (expected,) = reference_trajectory(case, [grad.float()])
    rounding = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps * 64
    assert np.abs(param.detach().double().numpy() - expected).max() <= rounding * np.abs(expected).max()


@pytest.mark.parametrize("case", MATRICES, ids=str)
@RUNS
@given(
    seed=st.integers(0, 2**20),
    rows=st.lists(st.floats(-11, 0), min_size=6, max_size=6),
    columns=st.lists(st.floats(-3, 0), min_size=5, max_size=5),
)
def test_rows_and_columns_of_any_size_equal_the_oracle(
    case: Case, seed: int, rows: list[float], columns: list[float]
) -> None:
    """Rows 1e11 apart and columns 1e3, which U brings to one size: beside ε₁ = 1e-30 squares of 1e-28 still count."""
    m, n = case.shape[-2:]
    of_rows = 10 ** torch.tensor(rows, dtype=torch.float64).repeat(m // len(rows)).unsqueeze(-1)
    of_columns = 10 ** torch.tensor(columns, dtype=torch.float64).repeat(n // len(columns))
    grads = gradients(case.shape, seed, [1.0] * STEPS, (0.0, 0.0))
    assert_equals_the_oracle(case, [(grad * of_rows * of_columns).float() for grad in grads])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@RUNS
@given(exponent=st.floats(14, 38), spread=st.booleans())
def test_what_overflows_moves_nothing_far_and_is_forgotten(
    case: Case, dtype: torch.dtype, exponent: float, spread: bool
) -> None:
    """Everywhere, or in a single number: all stays finite, moves stay clipped, and the averages come down again."""
    param = torch.nn.Parameter(torch.zeros(case.shape, dtype=dtype))
    optimizer = Flora([param], **case.all_options(state_dtype="int8"))
    ordinary, *others = gradients(case.shape, 0, [1.0] * 4, (0.0, 0.0))
    large = (ordinary.double() * 10**exponent).clamp(-3e38, 3e38).float() if spread else ordinary.clone()
    large.view(-1)[0] = 10**exponent
    largest = []
    for grad in (large, large, *others):
        before = param.detach().clone()
        param.grad = grad.to(dtype)
        optimizer.step()
        assert param.isfinite().all()
        # Clipping bounds the root mean square of a move, and so its norm; a bfloat16 rounds to 8 bits.
        moved = (param.detach() - before).double().norm()
        assert moved <= 1e-2 * param.numel() ** 0.5 * (1 + 2.0**-6)
        averages = [value for key, value in optimizer.state[param].items() if key.endswith(("_var", "variance"))]
        largest.append(max(float(value.max()) for value in averages))
    assert largest[-1] < largest[1]
    assert all(value.isfinite().all() for value in optimizer.state[param].values())
