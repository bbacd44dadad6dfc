"""The native kernels: what they take, that they equal the eager code, and that they bring nothing of their own along.

That they equal the float64 oracle is in ``test_oracle.py``, which runs every case on each instruction set.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from floragrad import Flora
from floragrad.policy import plan_accumulator
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.backends.cpu import library
from tests.torch.cases import CASES, Case
from tests.torch.conftest import use

TOLERANCE = 1e-5
STATE_DTYPES = ["float32", "bfloat16", "int8", "int4"]

pytestmark = pytest.mark.filterwarnings("ignore:Flora compresses no momentum")

# Sketches of several blocks of 64, ending within one; halves of bytes that lie across blocks; several chunks of rows.
SHAPES = [
    Case("blocks", (40, 390), {"ratio": 3}),
    Case("int4-halves-across-blocks", (12, 600), {"ratio": 4}),
    Case("lanes-and-a-rest", (37, 213), {"ratio": 2}),
    Case("a-slice-ends-in-whole-lanes-of-buckets", (37, 255), {"ratio": 2}),
    Case("many-chunks", (300, 130), {"ratio": 2}),
    Case("experts", (3, 70, 200), {"ratio": 4}),
    Case("whole", (24, 150), {"ratio": 1}),
    Case("paper", (40, 390), {"ratio": 3, "residual": False}),
    Case("clipped", (37, 213), {"ratio": 2, "clip_threshold": 0.25}),
    Case("paper-clipped", (40, 390), {"ratio": 3, "residual": False, "clip_threshold": 0.1}),
    Case("adaptive", (40, 390), {"ratio": 3, "projection": "adaptive"}),
    Case("full-second-moment", (24, 150), {"ratio": 2, "factorize_second_moment": False}),
    Case("vector", (300,)),
]


def train(case: Case, dtype: torch.dtype = torch.float32, steps: int = 12, **changes: Any) -> tuple[Tensor, Flora]:
    param = case.parameter(dtype)
    # Some are long enough to be taken for vocabularies, which would keep none.
    optimizer = Flora([param], **case.all_options(kappa=5, embedding_momentum="compressed", **changes))
    for grad in case.gradients(steps, dtype):
        param.grad = grad.clone()
        optimizer.step()
    return param.detach(), optimizer


def on(build: str, monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        use(build, patch)
        made = work()
    library._found.cache_clear()
    return made


def numbers(optimizer: Flora) -> Tensor:
    """What the momentum holds, as it is stored."""
    (state,) = optimizer.state.values()
    momentum: Tensor = state["exp_avg"]
    return momentum


# --- Numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_float32_equals_eager(case: Case, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are float32 with other orders of their sums: the tolerance is the oracle's."""
    native, _ = on(build, monkeypatch, lambda: train(case))
    eager, _ = on("eager", monkeypatch, lambda: train(case))
    assert (native - eager).abs().max() <= TOLERANCE * eager.abs().max()


@pytest.mark.parametrize("state_dtype", STATE_DTYPES[1:])
@pytest.mark.parametrize("case", SHAPES[:-1], ids=str)
def test_few_bits_are_those_of_eager(case: Case, state_dtype: str, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded with the same random bits, so stored alike, but for what a unit in the last place tips over.

    A float32 number in units of its grid, at most 128 of them, differs by a few 2**-24 of itself, so tips over with
    a probability of about 4 · 128 · 2**-24 = 3e-5 in a step; bfloat16, of 8 bits, with the same. One that has, is off
    for as long as it is remembered, 1 / (1 - beta1) = 10 steps: 3e-4 of all numbers. Of 2,000 to 20,000 numbers more
    than 1% would be 3 standard deviations and more; other random bits would change half of them.
    """
    _, native = on(build, monkeypatch, lambda: train(case, state_dtype=state_dtype))
    _, eager = on("eager", monkeypatch, lambda: train(case, state_dtype=state_dtype))
    different = (numbers(native) != numbers(eager)).float().mean()
    assert different <= 0.01, f"{different:.2%} of the numbers differ"


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[4], SHAPES[-1]], ids=str)
def test_bfloat16_parameters_are_those_of_eager(
    case: Case, stochastic: bool, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, but for the rare number that rounds the other way, and what follows from it: see above."""
    options = {"dtype": torch.bfloat16, "stochastic_rounding": stochastic, "weight_decay": 0.1}
    native, _ = on(build, monkeypatch, lambda: train(case, **options))
    eager, _ = on("eager", monkeypatch, lambda: train(case, **options))
    assert native.dtype == torch.bfloat16
    assert (native != eager).float().mean() <= 0.01
    torch.testing.assert_close(native, eager, rtol=2.0**-6, atol=1e-3)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(case: Case, state_dtype: str, monkeypatch: Any) -> None:
    """Sums are taken over chunks of rows, whichever thread takes a chunk."""
    assert not library.absence()
    big = replace(case, shape=(*case.shape[:-2], *(4 * size for size in case.shape[-2:])))
    made = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        param, optimizer = train(big, steps=6, state_dtype=state_dtype)
        made.append((param, numbers(optimizer)))
    torch.set_num_threads(1)
    for param, kept in made[1:]:
        assert torch.equal(param, made[0][0])
        assert torch.equal(kept, made[0][1])


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folds_equal_eager_ones(
    dtype: torch.dtype, state_dtype: Any, ratio: int, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows of three gradients, in one of which columns have been measured; and their noise."""
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(6, 2, 66, 390, generator=generator).to(dtype)
    plan = plan_accumulator((2, 66, 390), ratio=ratio, state_dtype=state_dtype, kind="matrix")

    def windows() -> tuple[Tensor, Tensor, Tensor]:
        sketch = GradientSketch(plan, "sign", 3, 1, torch.device("cpu"))
        decoded = torch.empty(2, 66, 390)
        for window in range(2):
            sketch.folds = 0
            for grad in grads[3 * window : 3 * window + 3]:
                sketch.add(grad, 1 / 3, window, measure_noise=True)
            sketch.decode_into(decoded, window, 0.0, 1.0)
        return sketch.buffers["data"], decoded, sketch.buffers.get("noise", torch.zeros(()))

    native, eager = on(build, monkeypatch, windows), on("eager", monkeypatch, windows)
    assert (native[0] != eager[0]).float().mean() <= (0.01 if state_dtype != "float32" else 1.0)
    error = (native[1] - eager[1]).norm() / eager[1].norm()
    assert error <= (TOLERANCE if state_dtype == "float32" else 0.01)
    torch.testing.assert_close(native[2], eager[2], rtol=0.01, atol=0)


# --- What they take ---------------------------------------------------------------------------------------


class Wrapped(torch.Tensor):
    """A tensor of another class, whose address may mean nothing."""


def test_the_report_names_the_code_of_each_tensor() -> None:
    kernels = library.library()
    assert kernels is not None
    makes: dict[str, Callable[[], Tensor]] = {
        f"native ({kernels.name})": lambda: torch.randn(64, 64),
        "eager (float16)": lambda: torch.randn(64, 64).half(),
        "eager (float64)": lambda: torch.randn(64, 64).double(),
        "eager (not contiguous)": lambda: torch.randn(64, 32).t(),
        "eager (Wrapped)": lambda: torch.randn(64, 64).as_subclass(Wrapped),
    }
    params = [torch.nn.Parameter(make()) for make in makes.values()]
    report = Flora(params, lr=1e-3, rank=8).report()
    assert [row.path for row in report.rows] == list(makes)
    (drawn,) = Flora(params[:1], lr=1e-3, rank=8, projection="gaussian").report().rows
    assert drawn.path == "eager (Gaussian projection)"


@pytest.mark.parametrize(
    "change",
    [
        lambda grad: grad.t().contiguous().t(),
        lambda grad: grad[:, :1].expand(-1, 48),
        lambda grad: torch.nn.functional.pad(grad, (0, 3))[:, :48],
    ],
    ids=["transposed", "expanded", "strided"],
)
def test_gradients_that_lie_elsewise_are_stepped_as_they_read(change: Callable[[Tensor], Tensor]) -> None:
    """By the eager code, to its rounding."""
    case = Case("", (64, 48), {"ratio": 4})
    odd, plain = case.parameter(), case.parameter()
    optimizers = [Flora([param], **case.all_options()) for param in (odd, plain)]
    for grad in case.gradients(3):
        odd.grad = change(grad)
        plain.grad = odd.grad.clone(memory_format=torch.contiguous_format)
        assert not odd.grad.is_contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert (odd - plain).abs().max() <= TOLERANCE * plain.abs().max()


def test_autograd_sees_that_the_parameter_has_changed() -> None:
    param = torch.nn.Parameter(torch.randn(64, 48))
    squares = (param * param).sum()
    param.grad = torch.ones_like(param)
    Flora([param], lr=1e-2, rank=8).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_not_a_number_spoils_its_block_and_no_memory(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in eager code: nothing is hidden, and a whole step's norm knows of it."""

    def work() -> Tensor:
        param = torch.nn.Parameter(torch.ones(40, 150))
        optimizer = Flora([param], lr=1e-2, ratio=2)
        param.grad = torch.ones(40, 150)
        param.grad[3, 4] = torch.nan
        optimizer.step()
        return param.detach()

    native, eager = on(build, monkeypatch, work), on("eager", monkeypatch, work)
    assert torch.equal(native.isnan(), eager.isnan())
    assert native.isnan().any()


# --- What they bring along --------------------------------------------------------------------------------


def test_they_are_there_where_there_is_a_compiler() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: the eager code runs")
    assert library.absence() == ""


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    library._found.cache_clear()
    monkeypatch.setenv("FLORAGRAD_KERNELS", "eager")
    param = torch.nn.Parameter(torch.randn(64, 64))
    (row,) = Flora([param], lr=1e-3, rank=8).report().rows
    assert row.path == "eager (FLORAGRAD_KERNELS=eager)"
    library._found.cache_clear()
    monkeypatch.setenv("FLORAGRAD_KERNELS", "yes")
    with pytest.raises(ValueError, match=r"FLORAGRAD_KERNELS=yes: auto runs .*, eager runs"):
        Flora([param], lr=1e-3, rank=8)
    monkeypatch.setenv("FLORAGRAD_NATIVE", "0")
    with pytest.raises(ValueError, match=r"FLORAGRAD_NATIVE=0 is no longer supported: set FLORAGRAD_KERNELS"):
        Flora([param], lr=1e-3, rank=8)
    library._found.cache_clear()


def test_without_a_build_the_eager_code_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    library._found.cache_clear()
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    param = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = Flora([param], lr=1e-3, rank=8)
    assert "no native kernels were built" in optimizer.report().rows[0].path
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert not torch.equal(param, before)
    library._found.cache_clear()


def test_kernels_of_another_version_are_left_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that lack a function that is called, as after an update of the sources alone."""
    runtime, load = library._torch_library(), ctypes.CDLL
    monkeypatch.setattr(library, "_torch_library", lambda: runtime)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: load(None))
    assert library._found.__wrapped__() == library.OTHER_VERSION


@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_split_installation_of_torch_is_taken(is_loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lies beside torch: its library is the one that is loaded, or the eager code runs and says why."""
    real = ctypes.CDLL

    def loaded(name: str, *args: Any, **kwargs: Any) -> ctypes.CDLL:
        if name == "libtorch_cpu.so" and not is_loaded:
            raise OSError(name)
        return real(name, *args, **kwargs)

    library._found.cache_clear()
    monkeypatch.setattr(library.torch, "__file__", "/nowhere/torch/__init__.py")
    monkeypatch.setattr(library.ctypes, "CDLL", loaded)
    param = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = Flora([param], lr=1e-3, rank=8)
    (row,) = optimizer.report().rows
    if not is_loaded:
        assert row.path == "eager (torch's own library was not found)"
    elif sys.platform == "linux":
        assert row.path.startswith("native")
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert (param < 1).all()
    library._found.cache_clear()


RUNTIMES = """
import torch
from floragrad import Flora
def runtimes():
    return {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}
torch.set_num_threads(2)
torch.ones(10**6).exp()
before = runtimes()
param = torch.nn.Parameter(torch.ones(1000, 1000))
param.grad = torch.ones(1000, 1000)
optimizer = Flora([param], lr=1e-3)
optimizer.step()
assert optimizer.report().rows[0].path.startswith("native")
print(len(before), runtimes() == before)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what is loaded from /proc")
def test_no_second_openmp_runtime_is_loaded() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    made = subprocess.run([sys.executable, "-c", RUNTIMES], check=True, capture_output=True, text=True, env=environment)
    assert made.stdout.split() == ["1", "True"]


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_the_library_needs_nothing_but_the_system(name: str) -> None:
    """No libtorch, no libgomp: one build serves every version of torch."""
    spec = find_spec(f"floragrad.torch.backends.cpu._{name}")
    if spec is None or shutil.which("objdump") is None:
        pytest.skip("not built on this processor, or no objdump to look with")
    listed = subprocess.run(["objdump", "-p", str(spec.origin)], check=True, capture_output=True, text=True).stdout
    needed = {line.split()[1].partition(".so")[0] for line in listed.splitlines() if "NEEDED" in line}
    assert needed <= {"libc", "libm", "libgcc_s", "libstdc++", "libpthread"}


def test_every_case_that_can_be_is_native() -> None:
    """The table of cases would not notice if all of them ran eager."""
    eager = {
        case.name
        for case in CASES
        for row in Flora([case.parameter()], **case.all_options()).report().rows
        if not row.path.startswith("native")
    }
    assert eager == {case.name for case in CASES if case.options.get("projection") == "gaussian"}
