"""Memory of a step and of a window beside state and gradients: measured, and as it is known in closed form."""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch

from floragrad import Flora
from floragrad.cli.plan.tracker import MemoryTracker
from floragrad.policy import plan_accumulator
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.temporaries import decode_bytes, fold_bytes, norm_bytes, step_bytes
from tests.torch.cases import CASES, Case

ON_BOTH = pytest.mark.parametrize("code", ["eager", "baseline"], indirect=True)
"""PyTorch's code, which makes its numbers a block at a time, and the native kernels."""
QUICK = [("float32", torch.bfloat16), ("int4", torch.float32)]
LOW_BIT = Case(
    "low-bit-second-moment", (24, 40), {"ratio": 4, "factorize_second_moment": False, "second_moment_dtype": "int8"}
)
LARGE = {
    1: (2**15,),
    2: (384, 256),
    3: (4, 96, 256),
    4: (64, 32, 8, 8),
}


def large_case(case: Case) -> tuple[int, ...]:
    """A shape of the same kind, large against a block of rows and against its own rows and columns."""
    if "vocabulary" in case.name:
        return (8448, 64)
    if case.shape and case.shape[0] < case.shape[-1] and len(case.shape) == 2:
        return (256, 384)
    return LARGE[len(case.shape)]


def test_the_counter_counts() -> None:
    with MemoryTracker() as memory:
        first = torch.zeros(1000)
        view = first[:10]
        second = first + 1
        assert memory.live == memory.peak == 8000
        del first
        assert memory.live == 8000, "a view keeps its storage alive"
        del view, second
        assert memory.live == 0
        torch.ones(500)
    assert memory.peak == 8000


def assert_bound(peak: int, bound: int, code: str) -> None:
    """Never below what was measured; the kernels' is exact but for single numbers, the eager code's 30% above."""
    assert peak <= bound
    assert bound <= (1.3 * peak + 1024 if code == "eager" else peak + 128), f"{bound / peak:.2f}"


@pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
@pytest.mark.parametrize(
    ("state_dtype", "dtype"),
    [
        # Each dtype of a parameter and of a state with every case; all pairs of them with make test-slow.
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
        for pair in product(("float32", "int8", "int4"), (torch.float32, torch.bfloat16))
    ],
    ids=str,
)
@pytest.mark.parametrize("case", [*(case for case in CASES if case.shape), LOW_BIT], ids=str)
@ON_BOTH
def test_a_step_needs_at_most_two_buffers(code: str, case: Case, state_dtype: str, dtype: torch.dtype) -> None:
    """Two float32 buffers of the tensor's size at a time; none outlives the step."""
    shape = large_case(case)
    param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = Flora([param], **case.all_options(state_dtype=state_dtype, kappa=2))
    buffer, peak = 4 * param.numel(), 0
    for _ in range(3):  # the second step resamples
        param.grad = torch.randn(shape).to(dtype)
        with MemoryTracker() as memory:
            optimizer.step()
            assert memory.live == 0, "a buffer outlives the step"
        peak = max(peak, memory.peak)
    assert peak <= 2 * buffer, f"{peak / buffer:.2f} buffers"
    if optimizer.param_groups[0]["projection"] == "sign":
        assert_bound(peak, step_bytes(optimizer.param_groups), "eager" if case is LOW_BIT else code)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", ["float32", "int8", "int4"])
@ON_BOTH
def test_a_step_of_a_large_tensor_needs_less_than_half_a_buffer(
    code: str, state_dtype: str, dtype: torch.dtype
) -> None:
    """Blocks of rows are all that is held; statistics are a row and a column."""
    param = torch.nn.Parameter(torch.zeros(4096, 1024, dtype=dtype))
    optimizer = Flora([param], lr=1e-3, state_dtype=state_dtype, kappa=2)
    param.grad = torch.randn(param.shape).to(dtype)
    for _ in range(2):
        with MemoryTracker() as memory:
            optimizer.step()
        assert 0 < memory.peak < 4 * param.numel() / 2, f"{memory.peak / 4 / param.numel():.2f} buffers"


def test_no_buffer_outlives_its_tensors_turn() -> None:
    """With many tensors the peak is that of the largest alone, not the sum."""
    params = [torch.nn.Parameter(torch.zeros(256, 384)) for _ in range(6)]
    optimizer = Flora(params, lr=1e-3, rank=32)
    peaks = []
    for count in (1, 6):
        for param in params[:count]:
            param.grad = torch.randn(param.shape)
        with MemoryTracker() as memory:
            optimizer.step()
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("beta1", [None, 0])
def test_no_momentum_allocates_none(beta1: float | None) -> None:
    param = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = Flora([param], lr=1e-3, rank=8, beta1=beta1)
    param.grad = torch.randn(64, 64)
    optimizer.step()
    assert set(optimizer.state[param]) == {"step", "tensor_id", "row_var", "col_var"}


def test_a_vocabulary_keeps_no_momentum() -> None:
    param = torch.nn.Parameter(torch.zeros(8448, 64))
    with pytest.warns(UserWarning, match="vocabulary-like"):
        optimizer = Flora([param], lr=1e-3, rank=8)
    assert set(optimizer.state[param]) == {"step", "tensor_id", "row_var", "col_var"}


@pytest.mark.filterwarnings("ignore:Flora compresses")
@ON_BOTH
def test_a_step_of_many_tensors_is_known_in_closed_form(code: str) -> None:
    """The kernels' buffers are as large as any tensor needs, though not the same one needs most of each."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 20_000), (20_000, 4), (300, 300), (5,), (0, 3))]
    optimizer = Flora(params, lr=1e-3, rank=2, kappa=1)
    for param in params:
        param.grad = torch.randn(param.shape)
    with MemoryTracker() as memory:
        optimizer.step()
    assert_bound(memory.peak, step_bytes(optimizer.param_groups), code)
    apart = [step_bytes([{**optimizer.param_groups[0], "params": [param]}]) for param in params]
    assert max(apart) <= step_bytes(optimizer.param_groups)
    assert apart[-1] == 0


def test_other_projections_are_not_known_in_closed_form() -> None:
    optimizer = Flora([torch.nn.Parameter(torch.zeros(64, 64))], lr=1e-3, rank=8, projection="adaptive")
    with pytest.raises(NotImplementedError, match="adaptive"):
        step_bytes(optimizer.param_groups)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("shape", [(384, 256), (3, 120, 260), (60, 50), (70_000,)], ids=str)
@ON_BOTH
def test_a_windows_memory_is_known_in_closed_form(code: str, shape: tuple[int, ...], state_dtype: str) -> None:
    """Folds of both kinds of gradients, the norm, and the decoding into a gradient that counts or does not."""
    for ratio, dtype in product((1, 3), (torch.float32, torch.bfloat16)):
        plan = plan_accumulator(shape, ratio=ratio, state_dtype=state_dtype)
        sketch, grad = GradientSketch(plan, "sign", 0, 0, torch.device("cpu")), torch.randn(shape).to(dtype)
        folds = [peak_of(partial(sketch.add, grad, 0.5, 0, measure_noise=True)) for _ in range(2)]
        assert_bound(max(folds), fold_bytes(plan, dtype), code)
        assert_bound(peak_of(sketch.squared_norm), norm_bytes(plan), "eager")
        for weight in (0.0, 0.5):
            peak = peak_of(partial(sketch.decode_into, grad, 0, weight, 0.5))
            assert_bound(peak, decode_bytes(plan, adds=weight > 0), "eager")


def peak_of(work: Callable[[], object]) -> int:
    with MemoryTracker() as memory:
        work()
    return memory.peak
