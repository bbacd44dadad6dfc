"""Placements that the matrix view of a tensor does not show, and states that are placed in another way."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from floragrad import Flora, GradientAccumulator
from tests.distributed import cases
from tests.distributed.cases import full, options_of
from tests.distributed.conftest import Worlds
from tests.distributed.test_shards import assert_equals_whole

SINGLE = {"position table": (1, 9, 40), "one expert": (1, 24, 32), "nested": (1, 1, 12, 40)}


def single_equals_whole(rank: int, options: dict[str, Any]) -> list[Tensor]:
    """Also the local states of a tensor, which are replicated."""
    assert_equals_whole(SINGLE, cases.fsdp, options)
    param = cases.fsdp(cases.Tensors({"one": (1, 9, 40)}))[0]
    optimizer = Flora([param], lr=1e-2, rank=4)
    cases.run_steps([param], optimizer, range(3))
    return [optimizer.state[param][key].to_local().clone() for key in ("exp_avg", "row_var", "col_var")]


@pytest.mark.parametrize(
    "options", [{}, {"projection": "adaptive"}, {"scale_parameter": True, "weight_decay": 0.1}], ids=str
)
def test_a_single_matrix_in_a_stack_is_stepped_by_all_devices(worlds: Worlds, options: dict[str, Any]) -> None:
    """(1, rows, columns), cut on its first dimension: one device has it, and all have its state."""
    here, there = worlds(2).run(single_equals_whole, options_of(**options))
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def accumulates(rank: int, shape: tuple[int, ...], kind: Any, dim: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    values, *gradients = torch.randn((5, *shape), generator=generator)
    whole = torch.nn.Parameter(values.clone())
    shard = torch.nn.Parameter(distribute_tensor(values, mesh, [Shard(dim)]))
    optimizers = [Flora([{"params": [each], "kind": kind}], lr=1e-2) for each in (whole, shard)]
    accumulator = GradientAccumulator(optimizers[1], steps=2, state_dtype="float32")
    for first, second in zip(gradients[::2], gradients[1::2], strict=True):
        whole.grad = (first + second) / 2
        optimizers[0].step()
        for each in (first, second):
            accumulator.backward((shard * distribute_tensor(each, mesh, [Shard(dim)])).sum())
        accumulator.step()
    torch.testing.assert_close(full(shard).detach(), whole.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "kind", "dim"),
    [((8, 6), "vector", 0), ((8, 6), "vector", 1), ((3, 4, 40), "vector", 1), ((1, 9, 40), None, 0)],
    ids=str,
)
def test_gradients_of_sharded_vectors_of_many_dimensions_are_summed(
    worlds: Worlds, shape: tuple[int, ...], kind: Any, dim: int
) -> None:
    worlds(2).run(accumulates, shape, kind, dim)


def stepped(mesh: DeviceMesh, *placements: Placement) -> tuple[Any, Flora]:
    """A parameter and its optimizer after one step; whole where there are no placements."""
    values, grad = torch.randn((2, 16, 16), generator=torch.Generator().manual_seed(0))
    param = torch.nn.Parameter(distribute_tensor(values, mesh, placements) if placements else values.clone())
    optimizer = Flora([param], lr=1e-2, rank=4, state_dtype="float32")
    step(param, optimizer, grad)
    return param, optimizer


def step(param: Any, optimizer: Flora, grad: Tensor) -> Tensor:
    is_sharded = isinstance(param, DTensor)
    param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if is_sharded else grad.clone()
    optimizer.step()
    return full(param).detach()


def loads_other_placements(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    expected = step(*stepped(mesh), grad)
    places: list[tuple[Placement, ...]] = [(), (Replicate(),), (Shard(0),), (Shard(1),)]
    for saved_in in places:
        _, saver = stepped(mesh, *saved_in)
        for loaded_in in places:
            param, loader = stepped(mesh, *loaded_in)
            loader.load_state_dict(saver.state_dict())
            torch.testing.assert_close(step(param, loader, grad), expected, rtol=1e-5, atol=1e-6)


def test_a_state_is_loaded_from_other_placements(worlds: Worlds) -> None:
    worlds(2).run(loads_other_placements)


def exchanged(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    expected = step(*stepped(mesh), grad)
    shard, optimizer = stepped(mesh, Shard(0))
    whole = torch.nn.Parameter(full(shard).detach().clone())
    optimizer.param_groups[0]["params"] = [whole]
    torch.testing.assert_close(step(whole, optimizer, grad), expected, rtol=1e-5, atol=1e-6)


def test_shards_exchanged_for_the_whole_tensor_keep_their_state(worlds: Worlds) -> None:
    worlds(2).run(exchanged)


def moves_other_strides(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    expected = step(*stepped(mesh, Shard(0)), grad)
    param, optimizer = stepped(mesh, Shard(0))
    state = optimizer.state[param]
    local = state["exp_avg"].to_local().T.contiguous().T
    assert not local.is_contiguous()
    state["exp_avg"] = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=state["exp_avg"].shape, stride=state["exp_avg"].stride()
    )
    assert torch.equal(step(param, optimizer, grad), expected)
    assert torch.equal(step(param, optimizer, grad), step(*_twice(mesh, grad)))


def _twice(mesh: DeviceMesh, grad: Tensor) -> tuple[Any, Flora, Tensor]:
    param, optimizer = stepped(mesh, Shard(0))
    step(param, optimizer, grad)
    return param, optimizer, grad


def test_a_sharded_state_with_other_strides_moves_on(worlds: Worlds) -> None:
    worlds(2).run(moves_other_strides)
