"""Without momentum Flora is Adafactor: Hugging Face's, and torch's where their settings mean the same.

Tolerance. The gradients are given, so errors do not feed back. In each of T steps either side rounds: the
parameter, r = 1 rounding of at most max|W| where it moves and 3 more where it decays; and the direction,
whose worst path is a mean over m and one over n, a mean of the means, a norm over m·n taken pairwise, and
about 20 single operations, (2m + 2n + 20) roundings relative to the step itself. So two runs differ by at most

    2 · 2⁻²⁴ · (r T max|W| + (2m + 2n + 20) Σ_t max|W_t - W_{t-1}|),

about 1e-5 for the shapes here, computed by ``rounding_bound`` from the run at hand, and asserted to be less
than a twentieth of the way that the parameter goes, however short its warm-up makes it.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers.optimization import Adafactor

from floragrad import Flora
from tests.torch.cases import Case

STEPS = 30
UNIT = 2.0**-24
Trajectory = list[np.ndarray]
Optimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

SHAPES = [
    Case("wide", (16, 48)),
    Case("tall", (48, 16)),
    Case("vocabulary", (100, 16)),
    Case("stacked-experts", (3, 16, 40)),
    Case("vector", (40,)),
    Case("one-element", (1,)),
]
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "plain": {"lr": 1e-2},
    "scale-parameter": {"lr": 1e-2, "scale_parameter": True},
    "relative-step": {"lr": None, "relative_step": True, "scale_parameter": True},
    "relative-step-alone": {"lr": None, "relative_step": True},
    "warmup-init": {"lr": None, "relative_step": True, "warmup_init": True, "scale_parameter": True},
    "weight-decay": {"lr": 1e-2, "weight_decay": 0.1},
    "scaled-weight-decay": {"lr": 1e-2, "weight_decay": 0.1, "scale_parameter": True},
    "tight-clip": {"lr": 1e-2, "clip_threshold": 0.3},
    "decay-rate": {"lr": 1e-2, "decay_rate": -0.5},
    "large-eps": {"lr": 1e-2, "eps": (1e-2, 2.0), "scale_parameter": True},
}


def trajectory(
    case: Case, make: Optimizer, *, lrs: list[float] | None = None, view: tuple[int, ...] | None = None
) -> Trajectory:
    """The parameter before the first and after every step; ``view`` gives both tensors another shape."""
    shape = view or case.shape
    param = torch.nn.Parameter(case.parameter().detach().reshape(shape))
    optimizer = make([param])
    course = [param.detach().double().numpy().copy()]
    for step, grad in enumerate(case.gradients(STEPS)):
        if lrs is not None:
            optimizer.param_groups[0]["lr"] = lrs[step]
        param.grad = grad.reshape(shape).clone()
        optimizer.step()
        course.append(param.detach().double().numpy().copy())
    return course


def flora(**options: Any) -> Optimizer:
    return lambda params: Flora(params, **options)


def rounding_bound(course: Trajectory, shape: tuple[int, ...], *, decays: bool) -> float:
    m, n = (1, shape[-1]) if len(shape) < 2 else shape[-2:]
    path = sum(np.abs(after - before).max() for before, after in pairwise(course))
    largest = max(np.abs(each).max() for each in course)
    roundings = (4 if decays else 1) * (len(course) - 1)
    return float(2 * UNIT * (roundings * largest + (2 * m + 2 * n + 20) * path))


def assert_same(found: Trajectory, expected: Trajectory, shape: tuple[int, ...], *, decays: bool = False) -> None:
    bound = rounding_bound(expected, shape, decays=decays)
    moved = np.abs(expected[-1] - expected[0]).max()
    assert bound < 5e-2 * moved, "the bound would hide what it is to show"
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = np.abs(ours.reshape(theirs.shape) - theirs).max()
        assert error <= bound, f"step {step}: {error:.2e} > {bound:.2e}"


# --- Hugging Face -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", HUGGING_FACE.values(), ids=HUGGING_FACE.keys())
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_without_momentum_equals_hugging_face(case: Case, options: dict[str, Any]) -> None:
    """Every option that both have, for every shape that both factor in the same way."""
    theirs = {"scale_parameter": False, "relative_step": False} | options
    ours = trajectory(case, flora(beta1=None, **options))
    expected = trajectory(case, lambda params: Adafactor(params, **theirs))
    assert_same(ours, expected, case.shape, decays="weight_decay" in options)


def test_a_convolution_equals_hugging_face_on_its_matrix_view() -> None:
    """They factor a (16, 3, 3, 3) kernel over its last two dimensions, 48 matrices of 3 x 3; Flora as 16 x 27."""
    case = Case("convolution", (16, 3, 3, 3))
    hugging_face = lambda params: Adafactor(params, lr=1e-2, scale_parameter=False, relative_step=False)  # noqa: E731
    ours = trajectory(case, flora(beta1=None, lr=1e-2))
    assert_same(ours, trajectory(case, hugging_face, view=(16, 27)), (16, 27))
    as_they_see_it = trajectory(case, hugging_face)
    assert np.abs(ours[-1] - as_they_see_it[-1]).max() > 1e-2


def test_full_momentum_equals_hugging_face_where_nothing_is_clipped() -> None:
    """They average clipped updates already times the learning rate, Flora averages U and clips the average.

    Where no update is clipped and the learning rate is constant, the two orders are one.
    """
    case = Case("wide", (16, 48))
    shared = {"lr": 1e-2, "beta1": 0.9, "weight_decay": 0.1, "clip_threshold": 1e9}
    theirs = trajectory(case, lambda params: Adafactor(params, scale_parameter=False, relative_step=False, **shared))
    ours = trajectory(case, flora(ratio=1, state_dtype="float32", **shared))
    assert_same(ours, theirs, case.shape, decays=True)


def test_full_momentum_differs_from_hugging_face_where_updates_are_clipped() -> None:
    """At the first step by exactly rms(U)/d: they clip U, and Flora (1 - β₁)U, which is below d here."""
    case, d = Case("wide", (16, 48)), 0.5
    shared = {"lr": 1e-2, "beta1": 0.9, "clip_threshold": d}
    ours = trajectory(case, flora(ratio=1, state_dtype="float32", **shared))
    theirs = trajectory(case, lambda params: Adafactor(params, scale_parameter=False, relative_step=False, **shared))
    grad = case.gradients(1)[0].double().numpy()
    update = normalised(grad, [grad**2])
    rms = np.sqrt(np.mean(update**2))
    assert d < rms < 10 * d
    # Differences of parameters: 4 roundings of max|W| on either side, as above.
    bound = 8 * UNIT * np.abs(ours[0]).max() * rms / d
    ours_moved, theirs_moved = ours[1] - ours[0], theirs[1] - theirs[0]
    assert np.abs(ours_moved - theirs_moved * rms / d).max() <= bound
    assert np.abs(ours_moved - theirs_moved).max() > 100 * bound


# --- torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"lr": 1e-2}, {"lr": 1e-2, "d": 2.0}, {"lr": 3e-2, "beta2_decay": -0.5}, {"lr": 1e-2, "eps": (1e-30, 2.0)}],
    ids=["plain", "loose-clip", "decay-rate", "scale-floor"],
)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_without_momentum_equals_torch(case: Case, options: dict[str, Any]) -> None:
    """With ``scale_parameter=True``, no weight decay, and a learning rate below 1/√t.

    torch always multiplies by max(eps2, rms(W)). Its eps1 bounds the variance from below instead of being
    added to squares (and is 1e-7 by default): the same only where gradients are far above it, as here.
    """
    renamed = {"d": "clip_threshold", "beta2_decay": "decay_rate"}
    same = {renamed.get(name, name): value for name, value in options.items()}
    theirs = trajectory(case, lambda params: torch.optim.Adafactor(params, **({"eps": (1e-30, 1e-3)} | options)))
    ours = trajectory(case, flora(beta1=None, scale_parameter=True, **same))
    assert_same(ours, theirs, case.shape)


def test_the_learning_rate_of_torch_is_bounded_by_the_step() -> None:
    """torch uses min(lr, 1/√t); Flora takes the given learning rate, and a schedule where one is wanted."""
    case = Case("wide", (16, 48))
    theirs = trajectory(case, lambda params: torch.optim.Adafactor(params, lr=0.3, eps=(1e-30, 1e-3)))
    options: dict[str, Any] = {"beta1": None, "scale_parameter": True}
    bounded = [min(0.3, t**-0.5) for t in range(1, STEPS + 1)]
    assert bounded[-1] < 0.3
    assert_same(trajectory(case, flora(lr=0.3, **options), lrs=bounded), theirs, case.shape)
    free = trajectory(case, flora(lr=0.3, **options))
    assert np.abs(free[-1] - theirs[-1]).max() > 0.1


def test_the_weight_decay_of_torch_is_not_scaled() -> None:
    """torch decays by lr·weight_decay, Flora (as Hugging Face) by α·weight_decay, α = lr·rms(W) here.

    One step with the decay divided by rms(W) is torch's: 4 roundings of max|W| and of the step, either side.
    """
    case = Case("wide", (16, 48))
    rms = float(np.sqrt(np.mean(case.parameter().detach().double().numpy() ** 2)))

    def first_step(make: Optimizer) -> np.ndarray:
        return trajectory(case, make)[1]

    theirs = first_step(lambda params: torch.optim.Adafactor(params, lr=1e-2, weight_decay=0.1, eps=(1e-30, 1e-3)))
    scaled = first_step(flora(beta1=None, scale_parameter=True, lr=1e-2, weight_decay=0.1 / rms))
    course = [case.parameter().detach().double().numpy(), theirs]
    assert np.abs(scaled - theirs).max() <= rounding_bound(course, case.shape, decays=True)


# --- Momentum at ρ = 1, and none --------------------------------------------------------------------------


def normalised(grad: np.ndarray, squares: list[np.ndarray]) -> np.ndarray:
    """U of Adafactor in float64, from all squared gradients so far: the averages written out as sums."""
    weights = [1.0]
    for t in range(2, len(squares) + 1):
        weights = [w * (1 - t**-0.8) for w in weights] + [t**-0.8]
    mean = np.sum([w * s for w, s in zip(weights, squares, strict=True)], axis=0)
    if grad.ndim < 2:
        return np.asarray(grad / np.sqrt(mean))
    row, col = mean.mean(axis=1, keepdims=True), mean.mean(axis=0, keepdims=True)
    return np.asarray(grad / np.sqrt(row * col / row.mean()))


def plain_momentum(case: Case, lr: float, beta1: float) -> Trajectory:
    """Adafactor whose U is averaged, bias and all, before it is clipped at 1."""
    param = case.parameter().detach().double().numpy()
    momentum, squares, course = np.zeros_like(param), [], [param]
    for grad in case.gradients(STEPS):
        squares.append(grad.double().numpy() ** 2)
        momentum = beta1 * momentum + (1 - beta1) * normalised(grad.double().numpy(), squares)
        param = param - lr * momentum / max(1.0, np.sqrt(np.mean(momentum**2)))
        course.append(param)
    return course


@pytest.mark.parametrize(
    ("projection", "residual"), [("sign", True), ("sign", False), ("gaussian", False), ("adaptive", True)]
)
@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[1], Case("vector", (40,))], ids=str)
def test_at_ratio_one_momentum_is_plain(case: Case, projection: str, residual: bool) -> None:
    """Whatever the projection and the estimator: nothing is projected. Epochs (κ = 10) change nothing."""
    found = trajectory(
        case,
        flora(lr=1e-2, ratio=1, kappa=10, state_dtype="float32", projection=projection, residual=residual),
    )
    assert_same(found, plain_momentum(case, lr=1e-2, beta1=0.9), case.shape)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_beta1_zero_is_no_momentum(case: Case) -> None:
    """Bit for bit, and neither keeps a buffer."""
    options: dict[str, Any] = {"lr": 1e-2, "ratio": 4}
    none, zero = (trajectory(case, flora(beta1=beta1, **options)) for beta1 in (None, 0.0))
    for ours, other in zip(none, zero, strict=True):
        assert np.array_equal(ours, other)
    for beta1 in (None, 0, 0.0):
        param = case.parameter()
        assert "exp_avg" not in Flora([param], beta1=beta1, **options).state[param]
