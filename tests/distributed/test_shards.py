"""Sharded parameters are stepped as whole ones are."""

from functools import cache
from typing import Any

import pytest
import torch
from torch.distributed.tensor import distribute_tensor

from floragrad import Flora
from tests.distributed import cases
from tests.distributed.cases import SHAPES, Sharding, Tensors, full, options_of, run_steps, whole_state
from tests.distributed.conftest import Worlds
from tests.marks import slow

TOLERANCE = 1e-5


def stepped(shapes: dict[str, tuple[int, ...]], sharding: Sharding | None, options: dict[str, Any]) -> list[Any]:
    """Parameters and states after the steps, whole."""
    dtype = options.pop("dtype", torch.float32)
    model = Tensors(shapes, dtype)
    params = list(model.tensors) if sharding is None else sharding(model)
    optimizer = Flora(params, **options)
    run_steps(params, optimizer)
    return [(full(param), whole_state(optimizer, param)) for param in params]


@cache
def stepped_whole(shapes: tuple[tuple[str, tuple[int, ...]], ...], **options: Any) -> list[Any]:
    """The same of whole tensors: once in each process, whatever they are compared with."""
    return stepped(dict(shapes), None, options)


def assert_equals_whole(shapes: dict[str, tuple[int, ...]], sharding: Sharding, options: dict[str, Any]) -> None:
    """Every parameter and statistic, relative to its tensor's largest number."""
    whole, found = stepped_whole(tuple(shapes.items()), **options), stepped(shapes, sharding, dict(options))
    for name, (param, state), (other, other_state) in zip(shapes, whole, found, strict=True):
        assert (param - other).abs().max() <= TOLERANCE * param.abs().max(), name
        assert state.keys() == other_state.keys()
        for key, value in state.items():
            off = (value.float() - other_state[key].float()).abs().max()
            assert off <= TOLERANCE * value.float().abs().max(), f"{name}: {key}"


def fsdp_equals_whole(_: int, options: dict[str, Any]) -> None:
    assert_equals_whole(SHAPES, cases.fsdp, options)


GAUSSIAN = {"projection": "gaussian"}
FSDP: list[dict[str, Any]] = [
    {},
    {"projection": "adaptive"},
    {"residual": False, "weight_decay": 0.1},
    {"factorize_second_moment": False},
    {"ratio": 1, "embedding_momentum": "full"},
    {"scale_parameter": True, "lr": None, "relative_step": True},
    {"state_dtype": "bfloat16", "beta1": None},
]


# A Gaussian projection is drawn anew in every step, by every process: by two of them here.
SIZES = [slow(2, {}), (2, GAUSSIAN), slow(4, GAUSSIAN), slow(4, {"beta1": None})]


@pytest.mark.parametrize(("size", "options"), [*SIZES, *((4, each) for each in FSDP)], ids=str)
def test_fsdp_equals_whole_tensors(worlds: Worlds, size: int, options: dict[str, Any]) -> None:
    """25 steps over two resamplings; even, uneven and empty shards."""
    worlds(size).run(fsdp_equals_whole, options_of(**options))


MATRICES = {"column-wise": (16, 48), "row-wise": (24, 40), "k does not divide n": (12, 74), "experts": (4, 8, 32)}
VECTORS = {"bias": (16,), "norm": (24,)}
# Tensor parallelism splits linear layers by their outputs or inputs; norms stay whole.
SPLIT = (0, 1, 1, 2, 0, None)
OTHERS = {
    "hsdp": cases.hsdp,
    "tensor parallel": cases.tensor_parallel(*SPLIT),
    "experts in batches and rows": cases.tensor_parallel(None, 0, 0, 0, None, 0),
    "fsdp and tensor parallel": cases.fsdp_and_tensor_parallel(*SPLIT),
}


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian": GAUSSIAN,
    "paper": {"residual": False},
    "whole": {"ratio": 1},
    "full": {"factorize_second_moment": False, "scale_parameter": True},
}
QUICK = {
    "hsdp": {"plain", "full"},
    "tensor parallel": {"paper", "full"},
    "experts in batches and rows": {"plain", "whole"},
    "fsdp and tensor parallel": {"plain", "full"},
}


def other_equals_whole(_: int, name: str, options: dict[str, Any]) -> None:
    assert_equals_whole(MATRICES | VECTORS, OTHERS[name], options)


@pytest.mark.parametrize(
    ("name", "options"),
    [(pytest.param if key in QUICK[name] else slow)(name, KINDS[key]) for name in OTHERS for key in KINDS],
    ids=str,
)
def test_other_shardings_equal_whole_tensors(worlds: Worlds, name: str, options: dict[str, Any]) -> None:
    """Replicas, rows, columns, experts, and rows of what is split by columns."""
    worlds(4).run(other_equals_whole, name, options_of(**options))


def low_bit_equals_whole(_: int, options: dict[str, Any]) -> None:
    """Compare what is stored after the steps, number by number."""
    whole, found = stepped_whole(tuple(SHAPES.items()), **options), stepped(SHAPES, cases.fsdp, dict(options))
    numbers = equal = 0
    for (_, state), (_, other) in zip(whole, found, strict=True):
        for key in state.keys() & {"exp_avg", "variance"}:
            if state[key].dtype != torch.float32:
                numbers += state[key].numel()
                equal += int((state[key] == other[key]).sum())
    assert equal >= 0.98 * numbers > 0


@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": "int8"},
        {"state_dtype": "int4"},
        {"state_dtype": "bfloat16"},
        {"beta1": None, "factorize_second_moment": False, "second_moment_dtype": "int8"},
    ],
    ids=str,
)
def test_low_bit_state_is_rounded_as_in_the_whole(worlds: Worlds, options: dict[str, Any]) -> None:
    """The same random bits for each row: what is stored is the same, but where a sum's last bit decides."""
    worlds(2).run(low_bit_equals_whole, options_of(**options))


def dead_units_equal_whole(rank: int) -> None:
    """Rows that are zero beside others of 1e10, on one process or on both, are no NaN in sums over shards."""
    grad = 1e10 * torch.randn(SHAPES["uneven"], generator=torch.Generator().manual_seed(0))
    grad[[0, 3, 12]] = 0
    made = []
    for sharding in (None, cases.fsdp, cases.tensor_parallel(1)):
        model = Tensors({"uneven": SHAPES["uneven"]})
        [param] = list(model.tensors) if sharding is None else sharding(model)
        optimizer = Flora([param], **options_of())
        for _ in range(3):
            param.grad = grad if sharding is None else distribute_tensor(grad, param.device_mesh, param.placements)
            optimizer.step()
        made.append(full(param))
    whole, *sharded = made
    assert whole.isfinite().all()
    for found in sharded:
        assert (found - whole).abs().max() <= TOLERANCE * whole.abs().max()


def test_dead_units_equal_whole_tensors(worlds: Worlds) -> None:
    worlds(2).run(dead_units_equal_whole)
