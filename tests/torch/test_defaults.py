"""Torch's global defaults, of dtype and of device, change no number: every factory call names both."""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import floragrad.torch
from floragrad import Flora, GradientAccumulator
from tests.torch.cases import CASES, Case

HOSTILE: list[torch.dtype | str] = [torch.bfloat16, torch.float16, torch.float64, "meta"]
CHOSEN = [
    case
    for case in CASES
    if case.name
    in ("k-does-not-divide-n", "ratio-1", "vector", "adaptive", "gaussian", "paper-estimator", "scale-parameter")
]
KEPT = [("int4", 1), ("int8", 2), ("float32", 2)]
FACTORIES = {
    *("zeros", "ones", "empty", "full", "tensor", "as_tensor", "scalar_tensor", "arange", "eye", "linspace"),
    *("logspace", "rand", "randn", "randint", "randperm", "normal", "empty_strided"),
}


@contextmanager
def default(hostile: torch.dtype | str) -> Iterator[None]:
    """What a user's notebook may have set."""
    if isinstance(hostile, str):
        torch.set_default_device(hostile)
    else:
        torch.set_default_dtype(hostile)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def unchanged(work: Callable[[], Callable[[], list[Tensor]]], hostile: torch.dtype | str) -> None:
    """What ``work`` prepares under the ordinary defaults gives the same bits under a hostile one."""
    expected = work()()
    prepared = work()
    with default(hostile):
        found = prepared()
    for ours, other in zip(found, expected, strict=True):
        assert ours.dtype == other.dtype
        assert torch.equal(ours, other)


@pytest.mark.parametrize("code", ["eager", "baseline"], indirect=True)
@pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
@pytest.mark.parametrize("hostile", HOSTILE, ids=str)
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_steps(code: str, case: Case, hostile: torch.dtype | str) -> None:
    """Allocation as well: the optimizer is made under the default."""

    def work() -> Callable[[], list[Tensor]]:
        params = [case.parameter(), case.parameter(torch.bfloat16, seed=1)]
        grads = case.gradients(3)

        def run() -> list[Tensor]:
            optimizer = Flora(params, **case.all_options(kappa=2, state_dtype="int8"))
            for grad in grads:
                for param in params:
                    param.grad = grad.to(param.dtype)
                optimizer.step()
            kept = [value for param in params for value in optimizer.state[param].values()]
            return [param.detach() for param in params] + kept

        return run

    unchanged(work, hostile)


@pytest.mark.parametrize("code", ["eager", "baseline"], indirect=True)
@pytest.mark.parametrize("hostile", HOSTILE, ids=str)
@pytest.mark.parametrize(("state_dtype", "ratio"), KEPT)
@pytest.mark.parametrize("release", [True, False])
def test_accumulation(code: str, release: bool, state_dtype: Any, ratio: int, hostile: torch.dtype | str) -> None:
    """A norm beyond float16's largest number, which clipping divides by; columns measured over several windows."""

    def work() -> Callable[[], list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.zeros(64, 96))
        directions = [torch.randn(64, 96, generator=generator) * 1e4 for _ in range(2)]
        optimizer = Flora([param], lr=1e-2, rank=16)

        def run() -> list[Tensor]:
            options: dict[str, Any] = {"ratio": ratio, "release": release, "clip": release or None}
            found = []
            with GradientAccumulator(optimizer, 2, state_dtype=state_dtype, **options) as accumulator:
                for _ in range(3):
                    for direction in directions:
                        accumulator.backward((param * direction).sum())
                    found.append(accumulator.clip_grad_norm_(1.0))
                    accumulator.step()
                    found.append(param.detach().clone())
            return found

        return run

    unchanged(work, hostile)


def factory_calls(source: str) -> Iterator[tuple[int, str, set[str]]]:
    """The line, name and keywords of every call of ``torch.<factory>`` and ``….new_<factory>``."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, keywords = node.func.attr, {str(keyword.arg) for keyword in node.keywords}
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "torch" and name in FACTORIES:
            yield node.lineno, name, keywords


def test_the_reader_of_factory_calls_reads() -> None:
    source = "torch.zeros(3)\nx.sum()\ntorch.full((2,), 1.0, dtype=d, device=c)\nnp.zeros(3)"
    assert list(factory_calls(source)) == [(1, "zeros", set()), (3, "full", {"dtype", "device"})]


def test_every_factory_call_names_dtype_and_device() -> None:
    package = Path(floragrad.torch.__file__).parent
    files = [*package.rglob("*.py"), *(package.parent / "planning").rglob("*.py")]
    calls = [(file.name, *call) for file in files for call in factory_calls(file.read_text())]
    assert len(calls) > 20
    wrong = [
        f"{file}:{line} torch.{name}" for file, line, name, keywords in calls if not {"dtype", "device"} <= keywords
    ]
    assert wrong == []
