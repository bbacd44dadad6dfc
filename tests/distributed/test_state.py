"""What a sharded parameter's state is, where it lies, what its step sends, and what is refused."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from floragrad import Flora
from tests.distributed import cases
from tests.distributed.cases import SHAPES, Tensors, as_parameter, full, options_of, run_steps
from tests.distributed.conftest import Worlds


def counts_collectives(_: int, name: str, options: dict[str, Any]) -> list[int]:
    """All-reduces of each step."""
    shardings = {
        "fsdp": cases.fsdp,
        "hsdp": cases.hsdp,
        "tensor parallel": cases.tensor_parallel(*[0] * len(SHAPES)),
        "fsdp and tensor parallel": cases.fsdp_and_tensor_parallel(*[0] * len(SHAPES)),
        "columns": cases.tensor_parallel(*[1 if len(shape) == 2 else None for shape in SHAPES.values()]),
    }
    params = shardings[name](Tensors(SHAPES))
    optimizer = Flora(params, **options_of(kappa=3, **options))
    counts = []
    for step in range(4):
        with mock.patch("torch.distributed.all_reduce", wraps=torch.distributed.all_reduce) as all_reduce:
            run_steps(params, optimizer, range(step, step + 1))
        counts.append(all_reduce.call_count)
    return counts


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("fsdp", {}, [2, 2, 2, 2]),
        ("fsdp", {"scale_parameter": True}, [2, 2, 2, 2]),
        ("hsdp", {}, [2, 2, 2, 2]),
        ("tensor parallel", {}, [2, 2, 2, 2]),
        # Two more, one for each power iteration, at the first step and on a resampling step.
        ("fsdp", {"projection": "adaptive"}, [4, 2, 4, 2]),
        ("fsdp and tensor parallel", {}, [4, 4, 4, 4]),
        ("columns", {}, [3, 3, 3, 3]),
    ],
    ids=str,
)
def test_collectives_of_a_step(worlds: Worlds, name: str, options: dict[str, Any], counts: list[int]) -> None:
    """Two for all parameters together; as many for each mesh dimension; one for sketches of split rows."""
    assert worlds(4).run(counts_collectives, name, options) == [counts] * 4


def is_placed_like_its_parameter(rank: int) -> None:
    model = Tensors(SHAPES)
    params = cases.fsdp(model)
    optimizer = Flora(params, lr=1e-3, ratio=4)
    keys = [sorted(optimizer.state[param]) for param in params]
    for param in params:
        assert isinstance(param, DTensor)
        state = optimizer.state[param]
        for key in ("exp_avg", "exp_avg_scale", "row_var", "variance"):
            if key in state:
                assert state[key].placements == param.placements == (Shard(0),)
                assert state[key].device_mesh == param.device_mesh
                assert state[key].to_local().shape[0] == param.to_local().shape[0], "rows are where their rows are"
        if "col_var" in state:
            expected = Shard(0) if param.dim() == 3 else Replicate()
            assert state["col_var"].placements == (expected,)
    report = optimizer.report()
    for row, param in zip(report.rows, params, strict=True):
        here = [value.to_local() if isinstance(value, DTensor) else value for value in optimizer.state[param].values()]
        assert row.state_bytes == sum(value.nbytes for value in here)
        assert row.adamw_bytes == 2 * 4 * param.to_local().numel() + 4
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, keys)
    assert all(each == keys for each in gathered)


def test_state_is_placed_like_its_parameter(worlds: Worlds) -> None:
    """Same keys on every rank, rows' state with their rows, and the report counts what is here."""
    worlds(4).run(is_placed_like_its_parameter)


def stepped_one_by_one(_: int) -> None:
    results = []
    for one_by_one in (False, True):
        params = cases.fsdp(Tensors(SHAPES))
        optimizer = Flora(params, **options_of())
        run_steps(params, optimizer, range(5), one_by_one=one_by_one)
        results.append([full(param) for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_parameters_stepped_one_by_one(worlds: Worlds) -> None:
    """Layer by layer, in another order: the same numbers."""
    worlds(2).run(stepped_one_by_one)


def refusals(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))

    def one(shape: tuple[int, ...], dim: int) -> nn.Parameter:
        return as_parameter(torch.zeros(shape), mesh, (Shard(dim),))

    with pytest.raises(
        ValueError, match=r"parameter 0 of shape \(16, 8, 3, 3\) is placed as .*shard it on dimension 0"
    ):
        Flora([one((16, 8, 3, 3), 1)], lr=1e-3)
    columns = one((64, 96), 1)
    with pytest.raises(ValueError, match=r"split along its columns.*projection='sign'"):
        Flora([columns], lr=1e-3, rank=8, projection="adaptive")
    for state_dtype in ("int8", "int4"):
        with pytest.raises(ValueError, match=rf"in {state_dtype}.*state_dtype='bfloat16'"):
            Flora([columns], lr=1e-3, ratio=1, state_dtype=state_dtype)
    Flora([one((64, 128), 1)], lr=1e-3, ratio=1, state_dtype="int8")
    optimizer = Flora([columns], lr=1e-3, rank=8)
    columns.grad = torch.zeros_like(columns)
    optimizer.step()


def test_what_cannot_be_stepped_is_refused(worlds: Worlds) -> None:
    """By name, with the way out."""
    worlds(2).run(refusals)
