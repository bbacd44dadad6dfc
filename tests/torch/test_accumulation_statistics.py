"""Over many windows the decoded gradient is the exact mean, with the variance that the formulas give.

Bounds are five standard errors of the mean over the draws: 6e-7 for one number, 1e-4 for all of a matrix. The
seeds are fixed, so a test that passes once passes always.
"""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from floragrad import GradientAccumulator
from floragrad.policy import plan_accumulator
from floragrad.torch.accumulation.sketch import GradientSketch
from tests.marks import slow

DRAWS = 2000
BOUND = 5.0
ROWS, COLUMNS = 5, 20
RATIOS = [slow(2), slow(5), 8]  # with 10, 4 and 3 buckets, the last of two sizes
WEIGHTS = [0.5, 0.2, 0.3]


def gradients() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(WEIGHTS), ROWS, COLUMNS, generator=generator) * torch.rand(COLUMNS, generator=generator)


def exact_sum() -> Tensor:
    return torch.einsum("i,imn->mn", torch.tensor(WEIGHTS), gradients())


@cache
def draws(ratio: int = 1, state_dtype: str = "float32", projection: str = "sign") -> dict[str, Tensor]:
    """The decoded sum, the estimate of its squared norm, and the measured noise, of every window.

    What is linear and not rounded is drawn for the sum at once.
    """
    rounded = state_dtype != "float32"
    folds = list(zip(gradients(), WEIGHTS, strict=True)) if rounded else [(exact_sum(), 1.0)]
    plan = plan_accumulator((ROWS, COLUMNS), kind="matrix", ratio=ratio, state_dtype=state_dtype)
    sketch = GradientSketch(plan, projection, seed=0, tensor_id=1, device=torch.device("cpu"))
    found: dict[str, list[Tensor]] = {"decoded": [], "square": [], "noise": [], "stored": []}
    for window in range(DRAWS // 4 if projection == "gaussian" else DRAWS // 2 if rounded else DRAWS):
        sketch.folds = 0
        for grad, weight in folds:
            sketch.add(grad, weight, window, measure_noise=True)
        decoded = torch.empty(ROWS, COLUMNS)
        sketch.decode_into(decoded, window, grad_weight=0.0, factor=1.0)
        found["decoded"].append(decoded)
        found["square"].append(sketch.squared_norm())
        found["noise"].append(sketch.buffers.get("noise", torch.zeros(())).clone())
        found["stored"].append(decoded.square().sum())
    return {key: torch.stack(values).double() for key, values in found.items()}


def assert_mean(samples: Tensor, expected: Tensor | float, variance: Tensor | float | None = None) -> None:
    """The mean of the samples is as expected; the variance of one sample is derived, or estimated."""
    spread = samples.var(0) if variance is None else variance
    error = (samples.mean(0) - expected).abs()
    bound = BOUND * (torch.as_tensor(spread).double() / len(samples)).sqrt()
    # Some of these are the same in every draw, but for float32's rounding.
    rounding = 1e-6 * torch.as_tensor(expected).abs().max()
    assert (error <= bound + rounding).all(), (error / bound).max()


def buckets(ratio: int) -> list[Tensor]:
    """The columns of each bucket of the exact sum."""
    width = -(-COLUMNS // ratio)
    return [exact_sum().double()[:, bucket::width] for bucket in range(width)]


@pytest.mark.parametrize("ratio", RATIOS)
def test_signs(ratio: int) -> None:
    """Var Ĝᵢⱼ is the energy of the row's other columns in the bucket of j: in all (ρ − 1)‖G‖²."""
    exact, width = exact_sum().double(), -(-COLUMNS // ratio)
    found = draws(ratio=ratio, state_dtype="float32")
    variance = torch.zeros_like(exact)
    for number, block in enumerate(buckets(ratio)):
        variance[:, number::width] = block.square().sum(1, keepdim=True) - block.square()
    assert_mean(found["decoded"], exact, variance)
    errors = (found["decoded"] - exact).square()
    assert_mean(errors.sum((1, 2)), variance.sum())
    if COLUMNS % width == 0:
        assert variance.sum() == pytest.approx((ratio - 1) * exact.square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("ratio", RATIOS)
def test_norm_of_signs(ratio: int) -> None:
    """‖C‖² is ‖G‖² in the mean, with variance 2 Σ (‖K‖² − ‖diag K‖²), K the Gram matrix of each bucket."""
    found = draws(ratio=ratio, state_dtype="float32")
    grams = [block.T @ block for block in buckets(ratio)]
    variance = sum(2 * (gram.square().sum() - gram.diagonal().square().sum()) for gram in grams)
    assert_mean(found["square"], exact_sum().double().square().sum(), variance)
    assert_mean((found["square"] - found["square"].mean()).square(), variance)


def test_gaussian() -> None:
    """The error has ((n + 1)/k)‖G‖², the squared norm 2‖GᵀG‖²/k of variance."""
    exact, ratio = exact_sum().double(), 2
    width = COLUMNS // ratio
    found = draws(ratio=ratio, state_dtype="float32", projection="gaussian")
    variance = (exact.square().sum(1, keepdim=True) + exact.square()) / width
    assert_mean(found["decoded"], exact, variance)
    total = (COLUMNS + 1) / width * exact.square().sum()
    assert variance.sum().item() == pytest.approx(total.item(), rel=1e-6)
    assert_mean((found["decoded"] - exact).square().sum((1, 2)), total)
    gram = exact.T @ exact
    assert_mean(found["square"], exact.square().sum(), 2 * gram.square().sum() / width)


@pytest.mark.parametrize(("state_dtype", "ratio"), [("int4", 1), slow("int8", 1), ("bfloat16", 1), slow("int4", 2)])
def test_few_bits(state_dtype: str, ratio: int) -> None:
    """Rounded after every micro-batch, the sum stays unbiased, and so does the norm."""
    exact = exact_sum().double()
    found = draws(ratio=ratio, state_dtype=state_dtype)
    assert_mean(found["decoded"], exact)
    assert_mean(found["square"], exact.square().sum())
    if ratio == 1:
        # Rounding errors are uncorrelated with all that came before: their squares add up.
        error = (found["decoded"] - exact).square().sum((1, 2))
        assert_mean(error - found["noise"], 0.0)
        # Each of the folds adds at most a quarter of the squared scale to each number's variance.
        steps = {"int4": 1 / 7, "int8": 1 / 127, "bfloat16": 2**-7}
        partial = torch.cumsum(torch.tensor(WEIGHTS)[:, None, None] * gradients(), 0).abs().amax((1, 2))
        largest = partial * (1 + steps[state_dtype]) ** len(WEIGHTS)
        bound = (steps[state_dtype] * largest).square().sum() / 4 * exact.numel()
        assert error.mean() < bound


def test_the_norm_would_be_biased_without_the_measured_noise() -> None:
    found, exact = draws(state_dtype="int4"), exact_sum().double().square().sum()
    excess = found["stored"].mean() - exact
    assert excess > 20 * (found["stored"].var() / len(found["stored"])).sqrt()
    assert excess.item() == pytest.approx(found["noise"].mean().item(), rel=0.1)


SIZES = torch.tensor([1.0, 10.0]).repeat(64)


def uneven_window(sketch: GradientSketch, window: int) -> tuple[Tensor, Tensor]:
    """A window's decoded sum and the exact one, of columns of two sizes."""
    generator = torch.Generator().manual_seed(window)
    grads = torch.randn(len(WEIGHTS), 32, 128, generator=generator) * SIZES
    sketch.folds = 0
    for grad, weight in zip(grads, WEIGHTS, strict=True):
        sketch.add(grad, weight, window, measure_noise=True)
    decoded = torch.empty(32, 128)
    sketch.decode_into(decoded, window, grad_weight=0.0, factor=1.0)
    return decoded, torch.einsum("i,imn->mn", torch.tensor(WEIGHTS), grads)


def uneven_sketch() -> GradientSketch:
    return GradientSketch(plan_accumulator((32, 128), kind="matrix"), "sign", 0, 0, torch.device("cpu"))


def test_small_columns_are_not_drowned_by_large_ones() -> None:
    """Each fold's variance is at most a quarter of the squared scale: a seventh of the block's largest number.

    In the first window that number is a large column's, later one of its own size.
    """
    sketch, small = uneven_sketch(), SIZES == 1
    drowned, exact = uneven_window(sketch, 0)
    assert (drowned - exact)[:, small].square().mean() > exact[:, small].square().mean()
    for window in range(1, 20):
        squares = sketch.buffers["col_var"][0].clone()
        kept, exact = uneven_window(sketch, window)
    sizes = (squares / squares.mean() + 0.01).sqrt()
    # The largest partial sum of a block of 64, which rounding moves by a seventh at most.
    largest = (torch.tensor(WEIGHTS).square().cumsum(0).sqrt() * 5 * (SIZES / sizes).max() * (1 + 1 / 7)) / 7
    bound = largest.square().sum() / 4 * sizes**2
    assert ((kept - exact).square().mean(0) < bound).all()
    assert (kept - exact)[:, small].square().mean() < exact[:, small].square().mean() / 4


def test_columns_of_one_size_leave_sum_and_norm_unbiased() -> None:
    sketch = uneven_sketch()
    uneven_window(sketch, 0)
    sizes = sketch.buffers["col_var"].clone()
    assert sizes[0, 1::2].mean() > 10 * sizes[0, ::2].mean() > 0
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(32, 128, generator=generator) * SIZES
    draws = 400
    decoded, squares = torch.empty(draws, 32, 128), torch.empty(draws)
    for window in range(draws):
        sketch.buffers["col_var"].copy_(sizes)
        sketch.folds = 0
        sketch.add(grad, 1.0, window, measure_noise=True)
        squares[window] = sketch.squared_norm()
        sketch.decode_into(decoded[window], window, grad_weight=0.0, factor=1.0)
        torch.testing.assert_close(sketch.buffers["noise"], (decoded[window] - grad).square().sum())
    own = (sizes / sizes.mean() + 0.01).sqrt()
    step = (grad / own).view(32, 2, 64).abs().amax(-1).repeat_interleave(64, 1).double() / 7 * own
    up = (grad / step) % 1
    # Var = p(1 − p) step²; what has hardly a chance to be rounded up is up once in all draws or so.
    assert_mean(decoded.double(), grad.double(), (up * (1 - up)).clamp(min=1 / draws) * step**2)
    assert_mean(squares.double(), grad.double().square().sum())


def test_sizes_of_columns_are_an_average_over_windows() -> None:
    sketch = uneven_sketch()
    first, _ = uneven_window(sketch, 0)
    average = first.square().mean(0)
    torch.testing.assert_close(sketch.buffers["col_var"][0], average)
    second, _ = uneven_window(sketch, 1)
    torch.testing.assert_close(sketch.buffers["col_var"][0], 0.9 * average + 0.1 * second.square().mean(0))
    before = sketch.buffers["col_var"].clone()
    sketch.folds = 0
    sketch.add(torch.full((32, 128), torch.inf), 1.0, 2, measure_noise=True)
    sketch.decode_into(torch.empty(32, 128), 2, grad_weight=0.0, factor=1.0)
    assert torch.equal(sketch.buffers["col_var"], before), "a window that is not finite says nothing of sizes"


class Recorder(torch.optim.Optimizer):
    """Keeps every gradient that it is given."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})
        self.seen: list[Tensor] = []

    def step(self) -> None:
        self.seen += [param.grad.clone() for group in self.param_groups for param in group["params"]]


@pytest.mark.parametrize("release", [True, slow(False)])
def test_whole_windows(release: bool) -> None:
    """Through the accumulator: with release all three gradients are sketched, else the last is used whole."""
    param = nn.Parameter(torch.zeros(ROWS, COLUMNS))
    recorder, norms, ratio = Recorder([param]), [], 2
    with GradientAccumulator(
        recorder, len(WEIGHTS), ratio=ratio, state_dtype="float32", release=release
    ) as accumulator:
        for _ in range(DRAWS):
            for grad, weight in zip(gradients(), WEIGHTS, strict=True):
                accumulator.backward((param * grad).sum(), weight=weight)
            norms.append(accumulator.grad_norm)
            accumulator.step()
    decoded, exact = torch.stack(recorder.seen).double(), exact_sum().double()
    sketched = exact if release else exact - WEIGHTS[-1] * gradients()[-1].double()
    errors = (decoded - exact).square().sum((1, 2))
    assert_mean(decoded, exact)
    assert_mean(errors, (ratio - 1) * sketched.square().sum())
    squares = torch.stack(norms).double().square()
    assert_mean(squares, exact.square().sum() if release else decoded.square().sum((1, 2)).mean())


def test_random_numbers_are_of_one_tensor_and_one_window() -> None:
    grad = torch.ones(2, 256)
    plan = plan_accumulator(grad.shape, kind="matrix", ratio=2, state_dtype="float32")

    def sketch(seed: int, index: int, window: int) -> Tensor:
        made = GradientSketch(plan, "sign", seed, index, torch.device("cpu"))
        made.add(grad, 1.0, window, measure_noise=False)
        return made.buffers["data"]

    base = sketch(0, 0, 0)
    assert torch.equal(base, sketch(0, 0, 0))
    for other in (sketch(1, 0, 0), sketch(0, 1, 0), sketch(0, 0, 1)):
        # Each of 128 sums of two signs, in {-2, 0, 2}: they agree with probability 3/8.
        agree = (base[0, 0] == other[0, 0]).float().mean().item()
        assert abs(agree - 3 / 8) < BOUND * (3 / 8 * 5 / 8 / 128) ** 0.5


def test_rounding_differs_between_folds() -> None:
    """The same value rounded in another fold meets other bits: else errors would add up."""
    plan = plan_accumulator((4, 256), state_dtype="int4")
    sketch = GradientSketch(plan, "sign", 0, 0, torch.device("cpu"))
    grad = torch.linspace(-1, 1, 1024).view(4, 256)
    stored = []
    for window, earlier in [(0, 0), (0, 1), (1, 0)]:
        sketch.folds = 0
        for _ in range(earlier):
            sketch.add(torch.zeros(4, 256), 1.0, window, measure_noise=False)
        sketch.add(grad, 1.0, window, measure_noise=False)
        stored.append(sketch.buffers["data"].clone())
    first, second, third = stored
    assert 0.2 < (first != second).float().mean() < 0.9
    assert 0.2 < (first != third).float().mean() < 0.9


@pytest.mark.parametrize(("state_dtype", "share"), [("int4", 0.013), ("int8", 0.00004)])
def test_noise_per_micro_batch_is_as_documented(state_dtype: str, share: float) -> None:
    """With gradients that have nothing in common; docs/accumulation.md quotes these numbers."""
    plan = plan_accumulator((64, 1024), state_dtype=state_dtype, kind="matrix")
    sketch = GradientSketch(plan, "sign", 0, 0, torch.device("cpu"))
    grads = torch.randn(16, 64, 1024, generator=torch.Generator().manual_seed(0))
    for grad in grads:
        sketch.add(grad, 1.0, 0, measure_noise=False)
    decoded = torch.empty(64, 1024)
    sketch.decode_into(decoded, 0, grad_weight=0.0, factor=1.0)
    found = (decoded - grads.sum(0)).square().sum() / grads.sum(0).square().sum()
    assert found.item() == pytest.approx(len(grads) * share, rel=0.1)
