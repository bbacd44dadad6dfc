"""Sketches summed over processes: exactly where they are exact, unbiased where they are rounded, in few messages."""

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, distributed

from floragrad.policy import AccumulatorPlan, plan_accumulator
from floragrad.torch.accumulation import all_reduce
from floragrad.torch.accumulation.all_reduce import all_reduce_sketches
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.distributed import collectives
from floragrad.torch.distributed.collectives import Ranks
from tests.distributed.conftest import Worlds
from tests.marks import slow

BOUND = 5.0
DRAWS = 400
SHAPE = (5, 20)
WEIGHTS = [0.4, 0.6]


def ranks_here() -> Ranks:
    ranks = Ranks.from_group(None)
    assert ranks is not None
    return ranks


def sketch_of(plan: AccumulatorPlan, rank: int, index: int = 0) -> GradientSketch:
    return GradientSketch(plan, "sign", 0, index, torch.device("cpu"), rank)


def gradients(shape: tuple[int, ...] = SHAPE) -> Tensor:
    """The same on every rank: rounding errors average out all the same, if every rank has bits of its own."""
    generator = torch.Generator().manual_seed(3)
    columns = torch.rand(shape[-1], generator=generator)
    return torch.randn(len(WEIGHTS), *shape, generator=generator) * columns


def draws(rank: int, state_dtype: Any, ratio: int) -> dict[str, Tensor]:
    """Windows whose sketches are summed over the ranks."""
    ranks = ranks_here()
    sketch = sketch_of(plan_accumulator(SHAPE, kind="matrix", ratio=ratio, state_dtype=state_dtype), rank)
    found: dict[str, list[Tensor]] = {"decoded": [], "square": [], "noise": []}
    for window in range(DRAWS):
        sketch.folds = 0
        for grad, weight in zip(gradients(), WEIGHTS, strict=True):
            sketch.add(grad, weight, window, measure_noise=True)
        all_reduce_sketches([sketch], window, ranks)
        found["square"].append(sketch.squared_norm())
        found["noise"].append(sketch.buffers["noise"].clone())
        decoded = torch.empty(SHAPE)
        sketch.decode_into(decoded, window, grad_weight=0.0, factor=1.0)
        found["decoded"].append(decoded)
    return {key: torch.stack(values).double() for key, values in found.items()}


@pytest.mark.parametrize(("state_dtype", "ratio"), [("int4", 1), slow("int8", 1), ("bfloat16", 1), slow("int4", 2)])
def test_rounded_sums_are_unbiased(worlds: Worlds, state_dtype: str, ratio: int) -> None:
    """The sum, its norm, and the measured noise; bounds are five standard errors of the mean over the draws."""
    first, second = worlds(2).run(draws, state_dtype, ratio)
    for key, value in first.items():
        assert torch.equal(value, second[key]), f"{key} is the same on all ranks"
    exact = 2 * torch.einsum("i,imn->mn", torch.tensor(WEIGHTS), gradients()).double()

    def assert_zero(samples: Tensor) -> None:
        error = BOUND * (samples.var(0) / len(samples)).sqrt()
        assert (samples.mean(0).abs() <= error + 1e-6).all()

    assert_zero(first["decoded"] - exact)
    assert_zero(first["square"] - exact.square().sum())
    if ratio == 1:
        # Would two ranks round with the same bits, their equal errors would add up to twice as much.
        assert_zero((first["decoded"] - exact).square().sum((1, 2)) - first["noise"])
        assert first["noise"].min() > 0


SHAPES = [(7, 64), (3, 4, 130), (1, 200), (2, 33), (50,), (64, 96), (1,), (40, 64)]


def summed(rank: int, state_dtype: Any, bucket_bytes: int) -> tuple[list[Tensor], int]:
    """Many tensors of odd shapes; how many collectives it took."""
    ranks, calls = ranks_here(), 0

    def counting(name: str) -> Any:
        original = getattr(distributed, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(*args, **kwargs)

        return patch.object(distributed, name, call)

    sketches = []
    for index, shape in enumerate(SHAPES):
        plan = plan_accumulator(shape, kind="matrix", state_dtype=state_dtype)
        sketches.append(sketch_of(plan, rank, index))
        generator = torch.Generator().manual_seed(100 * rank + index)
        sketches[-1].add(torch.randn(shape, generator=generator), 1.0, 0, measure_noise=True)
    with ExitStack() as patches:
        for module in (collectives, all_reduce):
            patches.enter_context(patch.object(module, "BUCKET_BYTES", bucket_bytes))
        for name in ("all_reduce", "all_to_all_single"):
            patches.enter_context(counting(name))
        all_reduce_sketches(sketches, 0, ranks)
    decoded = []
    for sketch in sketches:
        decoded.append(torch.empty(sketch.plan.shape))
        sketch.decode_into(decoded[-1], 0, grad_weight=0.0, factor=1.0)
    return decoded, calls


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_shapes_and_messages(worlds: Worlds, state_dtype: str, size: int) -> None:
    """Shapes that do not divide by the ranks; one flat message however many tensors, more where they are large."""
    exact = [
        sum(torch.randn(shape, generator=torch.Generator().manual_seed(100 * rank + index)) for rank in range(size))
        for index, shape in enumerate(SHAPES)
    ]
    expected_calls = 1 if state_dtype == "float32" else 3
    # A rounding moves a number by less than a step of its grid: a seventh of its block's largest number in int4.
    # First each rank rounds what it has, at most 4.5 here, then the sum is rounded.
    step = {"float32": 1e-6, "bfloat16": 2**-7, "int8": 1 / 127, "int4": 1 / 7}[state_dtype]
    for bucket_bytes in (2**20, 1000):
        results = worlds(size).run(summed, state_dtype, bucket_bytes)
        assert all((calls == expected_calls) == (bucket_bytes > 1000) for _, calls in results)
        for index, grad in enumerate(exact):
            found = results[0][0][index]
            assert all(torch.equal(found, other[index]) for other, _ in results)
            bound = step * 4.5 * size + step * (4.5 * size * (1 + step))
            assert (found - grad).abs().max() <= bound
            # And in all far nearer: the bound is of the worst number of the worst rank.
            assert (found - grad).square().mean() <= 0.1 * bound**2 + 1e-12


def joined(rank: int) -> list[Tensor]:
    """Two tensors, the second of which has had a gradient on rank 0 alone."""
    ranks, decoded = ranks_here(), []
    sketches = [sketch_of(plan_accumulator((4, 128), kind="matrix"), rank, index) for index in range(2)]
    for sketch in sketches[: 2 - rank]:
        sketch.add(torch.ones(4, 128), 1.0, 0, measure_noise=True)
    # What an earlier window left must not be summed.
    if rank == 1:
        sketches[1].add(torch.full((4, 128), 7.0), 1.0, 0, measure_noise=True)
        sketches[1].folds = 0
    for sketch in sketches:
        sketch.fill_zeros(torch.device("cpu"))
    all_reduce_sketches(sketches, 0, ranks)
    for sketch in sketches:
        decoded.append(torch.empty(4, 128))
        sketch.decode_into(decoded[-1], 0, grad_weight=0.0, factor=1.0)
    return decoded


def test_a_rank_without_a_gradient_adds_nothing(worlds: Worlds) -> None:
    for both, one in worlds(2).run(joined):
        # What is as large as its scale is rounded to itself, but for the last bits of a division by 7.
        torch.testing.assert_close(both, torch.full((4, 128), 2.0), rtol=1e-6, atol=0)
        torch.testing.assert_close(one, torch.ones(4, 128), rtol=1e-6, atol=0)
