"""The communication hook: what is lost of a gradient comes back, or is noise of the known size."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from floragrad.torch import FloraHookState, flora_hook
from tests.distributed.conftest import Worlds
from tests.marks import slow

SHAPES = {"square": (64, 64), "wide": (40, 100), "vector": (50,), "words": (8200, 4), "kernel": (32, 8, 3)}
MATRICES = ("square", "wide", "kernel")


class Given(nn.Module):
    """A model whose gradients are what it is called with."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        return torch.stack([(param * grads[name]).sum() for name, param in self.named_parameters()]).sum()


def gradients(rank: int, step: int, common: float = 0.0) -> dict[str, Tensor]:
    """Of one rank in one step; a part of them is the same in all steps."""
    found = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        fixed = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * rank + index))
        fresh = torch.randn(shape, generator=torch.Generator().manual_seed(100_000 * (step + 1) + 1000 * rank + index))
        found[name] = common * fixed + (1 - common) * fresh
    return found


class Run:
    """A wrapped model with the hook, or without one, and the gradients that it gave."""

    def __init__(self, rank: int, options: dict[str, Any] | None, common: float = 0.0) -> None:
        self.rank, self.common = rank, common
        # Several buckets, which PyTorch sorts anew after the first step.
        self.model = DistributedDataParallel(Given(), bucket_cap_mb=0.02)
        self.state = None if options is None else FloraHookState(**{"error_feedback": True, **options})
        if self.state is not None:
            self.model.register_comm_hook(self.state, flora_hook)

    def go(self, first: int, last: int) -> list[dict[str, Tensor]]:
        found = []
        for step in range(first, last):
            self.model.zero_grad()
            self.model(gradients(self.rank, step, self.common)).backward()
            found.append({name: param.grad.clone() for name, param in self.model.module.named_parameters()})
        return found

    def errors(self) -> dict[str, Tensor]:
        assert self.state is not None
        sent = {name: self.state._tensors[param] for name, param in self.model.module.named_parameters()}
        return {name: each.error.clone() for name, each in sent.items() if each.error is not None}


def averaged(rank: int, steps: int, options: dict[str, Any], common: float) -> tuple[Any, Any]:
    run = Run(rank, options, common)
    return run.go(0, steps), run.errors()


def total(grads: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([each[name] for each in grads]).double().sum(0)


def mean_gradient(steps: int, name: str, common: float) -> Tensor:
    """Over two ranks, summed over the steps."""
    every = [gradients(rank, step, common)[name].double() for rank in range(2) for step in range(steps)]
    return torch.stack(every).sum(0) / 2


@pytest.mark.parametrize("ratio", [2, 4])
def test_with_error_feedback_nothing_is_lost(worlds: Worlds, ratio: int) -> None:
    """The sum of what was decoded, and what the ranks still hold, is the sum of all gradients.

    An orthogonal projection to 1/ρ leaves (1 − 1/ρ)‖G + e‖² in the mean: with independent gradients ‖e‖² settles at
    (ρ − 1)‖G‖². The unbiased decoder would leave (ρ − 1)‖G + e‖²: 3^20 times as much after 20 steps at ρ = 4.
    """
    steps = 20
    results = worlds(2).run(averaged, steps, {"ratio": ratio}, 0.0)
    for name in SHAPES:
        assert all(torch.equal(a[name], b[name]) for a, b in zip(results[0][0], results[1][0], strict=True))
        held = [errors[name].double() for _, errors in results] if name in MATRICES else [torch.zeros(())]
        exact = mean_gradient(steps, name, 0.0)
        error = total(results[0][0], name) + sum(held) / 2 - exact
        assert error.abs().max() < 1e-5 * exact.abs().max()
        for each in held:
            assert each.square().mean() < 1.3 * (ratio - 1)
        if name in MATRICES:
            assert held[0].square().mean() > 0.5 * (ratio - 1), "something was left over"


def test_with_error_feedback_a_steady_gradient_arrives(worlds: Worlds) -> None:
    """The sum over T steps is T·G but for what is held, which does not grow with T: an error of 1/T."""
    far: dict[int, float] = {}
    for steps in (10, 40):
        found, _ = worlds(2).run(averaged, steps, {"ratio": 4}, 1.0)[0]
        exact = mean_gradient(steps, "square", 1.0)
        far[steps] = ((total(found, "square") - exact).norm() / exact.norm()).item()
    assert far[40] < 0.4 * far[10]


@pytest.mark.parametrize(
    ("projection", "ratio"),
    # Gaussian projections take longest; test_accumulation_statistics.py has them in one process.
    [slow("sign", 2), ("sign", 4), slow("gaussian", 4), slow("gaussian", 2)],
)
def test_without_error_feedback_it_is_unbiased(worlds: Worlds, ratio: int, projection: str) -> None:
    """The mean of T decoded gradients has 1/T of the variance of one: (ρ − 1)‖G‖², Gaussian ((n + 1)/k)‖G‖².

    All rows share their signs, so at ρ = 2 one run's error is a sum of (64 + 100 + 24)/2 squares, each nearly Gaussian:
    with three runs four standard deviations are 4·√(2/282).
    """
    steps, error, expected = 60, 0.0, 0.0
    for seed in range(3):
        options = {"ratio": ratio, "error_feedback": False, "projection": projection, "seed": seed}
        found, errors = worlds(2).run(averaged, steps, options, 1.0)[0]
        assert not errors
        for name, columns in {"square": 64, "wide": 100, "kernel": 24}.items():
            exact = mean_gradient(1, name, 1.0)
            factor = ratio - 1 if projection == "sign" else (columns + 1) / (columns // ratio)
            error += (total(found, name) / steps - exact).square().sum().item()
            expected += factor * exact.square().sum().item() / steps
    assert error == pytest.approx(expected, rel=4 * (2 / 282) ** 0.5)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8", "int4"])
def test_few_bits(worlds: Worlds, state_dtype: str) -> None:
    """What a rank rounds off is fed back; what the sum is rounded by is not, and is small and unbiased."""
    steps = 20
    results = worlds(2).run(averaged, steps, {"ratio": 1, "state_dtype": state_dtype}, 0.0)
    step = {"bfloat16": 2**-8, "int8": 1 / 127, "int4": 1 / 7}[state_dtype]
    for name in ("square", "wide", "words"):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(results[0][0], results[1][0], strict=True))
        held = sum(errors[name].double() for _, errors in results) / 2
        assert held.abs().max() > 0
        error = total(results[0][0], name) + held - mean_gradient(steps, name, 0.0)
        # Per step at most a quarter of the squared grid step of variance; the largest of a mean of two is below 4.5.
        assert error.square().mean() < steps * (step * 4.5) ** 2 / 4


def test_no_compression_is_the_mean(worlds: Worlds) -> None:
    (found, errors), _ = worlds(2).run(averaged, 3, {"ratio": 1}, 0.0)
    assert not errors
    for name in SHAPES:
        torch.testing.assert_close(total(found, name), mean_gradient(3, name, 0.0), rtol=1e-6, atol=1e-6)


def test_the_first_steps_are_whole(worlds: Worlds) -> None:
    (found, _), _ = worlds(2).run(averaged, 3, {"ratio": 4, "start_step": 2}, 0.0)
    for step in range(3):
        exact = (gradients(0, step)["square"] + gradients(1, step)["square"]) / 2
        assert torch.allclose(found[step]["square"], exact, rtol=1e-6, atol=1e-6) == (step < 2)


def messages(rank: int, options: dict[str, Any]) -> list[int]:
    """Numbers of each all-reduce of one step, after PyTorch has sorted the buckets."""
    run, sizes = Run(rank, options), []
    run.model.zero_grad()
    run.go(0, 2)
    original = distributed.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    with patch.object(distributed, "all_reduce", counting):
        run.go(2, 3)
    return sizes


def test_what_is_sent(worlds: Worlds) -> None:
    """One all-reduce for a bucket, of a quarter of each matrix's columns; words and vectors are whole."""
    expected = 64 * 16 + 40 * 25 + 50 + 8200 * 4 + 32 * 6
    for sizes in worlds(2).run(messages, {"ratio": 4}):
        assert sum(sizes) == expected
        assert 1 < len(sizes) < len(SHAPES)


def resumed(rank: int, options: dict[str, Any]) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    whole = Run(rank, options).go(0, 6)
    first = Run(rank, options)
    first.go(0, 3)
    assert first.state is not None
    saved = first.state.state_dict()
    second = Run(rank, options)
    assert second.state is not None
    second.state.load_state_dict(saved)
    return whole[3:], second.go(3, 6)


@pytest.mark.parametrize(
    "options", [{"ratio": 4}, {"ratio": 1, "state_dtype": "int4"}, {"ratio": 4, "start_step": 2}], ids=str
)
def test_resumed_bit_for_bit(worlds: Worlds, options: dict[str, Any]) -> None:
    for whole, second in worlds(2).run(resumed, options):
        for step, other in zip(whole, second, strict=True):
            assert all(torch.equal(step[name], other[name]) for name in SHAPES)


def overflowing(rank: int) -> list[bool]:
    """Whether gradients are finite, an infinite one on one rank in the second step."""
    run, found = Run(rank, {"ratio": 4}), []
    for step in range(3):
        grads = gradients(rank, step)
        if (rank, step) == (1, 1):
            grads["square"][0, 0] = torch.inf
        run.model.zero_grad()
        run.model(grads).backward()
        found.append(bool(run.model.module.square.grad.isfinite().all()))
    return found


def test_an_overflow_is_not_fed_back(worlds: Worlds) -> None:
    assert worlds(2).run(overflowing) == [[True, False, True]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "gaussian", "error_feedback": True}, "error_feedback=False"),
        ({"projection": "adaptive", "error_feedback": False}, "use projection='sign'"),
        ({"ratio": 0}, "ratio=0"),
        ({"ratio": 2, "rank": 4}, "give one of them"),
        ({"state_dtype": "int2"}, "state_dtype='int2'"),
        ({"start_step": -1}, "start_step=-1"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FloraHookState(**options)
    saved = FloraHookState(ratio=2).state_dict()
    with pytest.raises(ValueError, match="construct it with the same options"):
        FloraHookState(ratio=4).load_state_dict(saved)


def loaded_late(rank: int) -> str:
    run = Run(rank, {"ratio": 4})
    run.go(0, 1)
    assert run.state is not None
    try:
        run.state.load_state_dict(FloraHookState(ratio=4, error_feedback=True).state_dict())
    except RuntimeError as error:
        return str(error)
    return "nothing was noticed"


def test_a_state_in_use_is_not_loaded(worlds: Worlds) -> None:
    assert all("load into a new FloraHookState" in said for said in worlds(2).run(loaded_late))
