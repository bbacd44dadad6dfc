"""Checkpoints of sharded training, written and read by ``torch.distributed.checkpoint``."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from floragrad import Flora
from tests.distributed import cases
from tests.distributed.cases import SHAPES, STEPS, Tensors, full, options_of, run_steps, whole_state
from tests.distributed.conftest import Worlds
from tests.marks import slow

HALF = 12
TOLERANCE = 1e-5
OPTIONS = {
    "float32": options_of(),
    "int8": options_of(state_dtype="int8"),
    "int4": options_of(state_dtype="int4", ratio=2),
    "adaptive": options_of(projection="adaptive"),
    "no momentum": options_of(beta1=None, factorize_second_moment=False),
}
QUICK = {"int4", "adaptive"}


SPLIT = {"column-wise": ((16, 48), 0), "row-wise": ((24, 40), 1), "bias": ((16,), 0), "norm": ((24,), None)}
"""Shapes, and the dimension that tensor parallelism splits."""
MESH_SHAPES = {name: shape for name, (shape, _) in SPLIT.items()}
SHARDINGS: dict[str, cases.Sharding | None] = {
    "fsdp": cases.fsdp,
    "hsdp": cases.hsdp,
    "fsdp and tensor parallel": cases.fsdp_and_tensor_parallel(*[dim for _, dim in SPLIT.values()]),
    "whole": None,
}
MAX_NORM = 20.0
"""Of gradients whose norm is 50 to 70."""


def trained(
    sharding: cases.Sharding | None, options: dict[str, Any], shapes: dict[str, tuple[int, ...]] = SHAPES
) -> tuple[Tensors, Flora]:
    """A model and its optimizer, at the start."""
    model = Tensors(shapes)
    params = list(model.tensors) if sharding is None else sharding(model)
    return model, Flora(params, **options)


def go_on(model: Tensors, optimizer: Flora, steps: range) -> None:
    run_steps(list(model.tensors), optimizer, steps)


def save(_: int, path: str, options: dict[str, Any]) -> list[Any]:
    """Train half of the steps and save; the keys of this rank's state."""
    model, optimizer = trained(cases.fsdp, options)
    go_on(model, optimizer, range(HALF))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
    return sorted((name, key) for name, each in state["state"].items() for key in each)


def load_and_go_on(_: int, path: str, options: dict[str, Any], name: str) -> list[Any]:
    """Load into a fresh model, train to the end; parameters and states, whole."""
    model, optimizer = trained(SHARDINGS[name], options)
    go_on(model, optimizer, range(3))  # what is there before must not matter
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    go_on(model, optimizer, range(HALF, STEPS))
    return [(full(param), whole_state(optimizer, param)) for param in model.tensors]


def uninterrupted(options: dict[str, Any]) -> list[Any]:
    model, optimizer = trained(None, options)
    go_on(model, optimizer, range(STEPS))
    return [(full(param), whole_state(optimizer, param)) for param in model.tensors]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    """Relative to each tensor's largest number; what is stored in few bits may be a step apart in 2% of places."""
    for (param, state), (other, other_state) in zip(expected, found, strict=True):
        low_bit = "exp_avg_scale" in state
        assert state.keys() == other_state.keys()
        for key, value, there in [("", param, other), *((key, state[key], other_state[key]) for key in state)]:
            off = (value.float() - there.float()).abs()
            if key == "exp_avg" and low_bit:
                assert (off > 0).float().mean() <= 0.02
            else:
                assert off.max() <= TOLERANCE * value.float().abs().max(), key


@pytest.mark.parametrize("name", [(pytest.param if name in QUICK else slow)(name) for name in OPTIONS])
def test_training_goes_on_with_another_number_of_processes(worlds: Worlds, tmp_path: Path, name: str) -> None:
    """Saved on 2; gone on with 4, with 2 pairs of replicas, and with whole tensors, as if nothing had happened."""
    options, path = OPTIONS[name], str(tmp_path / "checkpoint")
    keys = worlds(2).run(save, path, options)
    assert keys[0] == keys[1], "also of the ranks with empty shards"
    expected = uninterrupted(options)
    for size, sharding in ((4, "fsdp"), (4, "hsdp"), (2, "whole")):
        for found in worlds(size).run(load_and_go_on, path, options, sharding):
            assert_same(found, expected)


def loads_whole_state(_: int, state: dict[str, Any], weights: dict[str, Any], options: dict[str, Any]) -> list[Any]:
    model, optimizer = trained(cases.fsdp, options)
    whole = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=whole)
    go_on(model, optimizer, range(HALF, STEPS))
    again, back = get_state_dict(model, optimizer, options=whole)
    assert not any(isinstance(value, DTensor) for each in back["state"].values() for value in each.values())
    assert not any(isinstance(value, DTensor) for value in again.values())
    return [(full(param), whole_state(optimizer, param)) for param in model.tensors]


def loads_plainly(_: int, state: dict[str, Any], weights: dict[str, Any], options: dict[str, Any]) -> list[Any]:
    model, optimizer = trained(cases.fsdp, options)
    for param, (_, value) in zip(model.tensors, weights.items(), strict=True):
        assert isinstance(param, DTensor)
        local = cases.as_parameter(value, param.device_mesh, param.placements)
        with torch.no_grad():
            param.copy_(local)
    optimizer.load_state_dict(state)
    go_on(model, optimizer, range(HALF, STEPS))
    return [(full(param), whole_state(optimizer, param)) for param in model.tensors]


@pytest.mark.parametrize("name", [slow("float32"), "adaptive"])
def test_a_state_of_one_process_is_taken_up_by_shards(worlds: Worlds, name: str) -> None:
    """Whole tensors, through ``set_state_dict`` or ``load_state_dict``, are cut where they are loaded."""
    options = OPTIONS[name]
    model, optimizer = trained(None, options)
    go_on(model, optimizer, range(HALF))
    weights, state = get_state_dict(model, optimizer)
    expected = uninterrupted(options)
    for found in worlds(2).run(loads_whole_state, state, weights, options):
        assert_same(found, expected)
    for found in worlds(2).run(loads_plainly, optimizer.state_dict(), weights, options):
        assert_same(found, expected)


def clipped(model: Tensors, optimizer: Flora, steps: range) -> list[float]:
    """Steps with gradients clipped by their global norm; the norms."""
    norms = []

    def clip(*_: Any) -> None:
        norms.append(float(full(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))))

    handle = optimizer.register_step_pre_hook(clip)
    run_steps(list(model.tensors), optimizer, steps)
    handle.remove()
    return norms


def on_a_mesh(_: int, path: str, name: str, begins: bool) -> tuple[list[float], list[Any]]:
    """Half of the steps, saved; or the other half, loaded."""
    model, optimizer = trained(SHARDINGS[name], options_of(), MESH_SHAPES)
    weights, state = get_state_dict(model, optimizer)
    if not begins:
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    norms = clipped(model, optimizer, range(HALF) if begins else range(HALF, STEPS))
    if begins:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
    return norms, [(full(param), whole_state(optimizer, param)) for param in model.tensors]


def test_a_mesh_of_two_dimensions_clips_saves_and_resumes(worlds: Worlds, tmp_path: Path) -> None:
    """FSDP2 and tensor parallelism on 4 processes; gone on there, with shards on 2, and with whole tensors."""
    path, name = str(tmp_path / "checkpoint"), "fsdp and tensor parallel"
    model, optimizer = trained(None, options_of(), MESH_SHAPES)
    norms = clipped(model, optimizer, range(STEPS))
    assert min(norms) > MAX_NORM
    expected = [(full(param), whole_state(optimizer, param)) for param in model.tensors]
    for found, _ in worlds(4).run(on_a_mesh, path, name, True):
        assert found == pytest.approx(norms[:HALF], rel=TOLERANCE)
    for size, sharding in ((4, name), (2, "fsdp"), (2, "whole")):
        for found, state in worlds(size).run(on_a_mesh, path, sharding, False):
            assert found == pytest.approx(norms[HALF:], rel=TOLERANCE)
            assert_same(state, expected)
