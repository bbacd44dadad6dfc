"""Sharded training is clipped by the norm of all shards, saved by orbax, and goes on with other numbers of devices."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from floragrad.jax import flora
from tests.jax.test_sharding import assert_same, numbers, step_of
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("unoptimized")

SHAPES = {"kernel": (64, 96), "experts": (8, 32, 48), "bias": (96,)}
SPECS = {"kernel": PartitionSpec(None, "x"), "experts": PartitionSpec("x"), "bias": PartitionSpec()}
HALF, STEPS = 3, 6


def optimizer_of() -> optax.GradientTransformation:
    """Clipped tightly: the norm of the gradients is about 135."""
    return optax.chain(optax.clip_by_global_norm(1.0), flora(1e-2, ratio=4, kappa=2, mu_dtype="float32"))


def placed(tree: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    return {name: jax.device_put(value, NamedSharding(mesh, SPECS[name])) for name, value in tree.items()}


def as_placed(leaf: jax.Array, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Where an array is to be restored: where it is; counts, which are nowhere in particular, on the whole mesh."""
    sharding = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def drawn(seed: int, mesh: Mesh) -> dict[str, Any]:
    return placed({name: numbers(shape, seed + at) for at, (name, shape) in enumerate(SHAPES.items())}, mesh)


@cache
def step() -> Any:
    """One function, compiled for each placement of its arguments."""
    return step_of(optimizer_of())


def go_on(param: Any, state: Any, mesh: Mesh, steps: range) -> tuple[Any, Any]:
    for at in steps:
        param, state = step()(param, state, drawn(10 * (at + 1), mesh))
    return param, state


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("x",))


@pytest.fixture(scope="module")
def uninterrupted() -> dict[int, Any]:
    """Where 8 devices and one arrive."""
    found = {}
    for devices in (8, 1):
        mesh = mesh_of(devices)
        param = drawn(0, mesh)
        found[devices], _ = go_on(param, optimizer_of().init(param), mesh, range(STEPS))
    return found


def test_clips_by_the_norm_of_all_shards(uninterrupted: dict[int, Any]) -> None:
    for name in SHAPES:
        assert_same(uninterrupted[8][name], np.asarray(uninterrupted[1][name]))


@pytest.mark.parametrize("devices", [8, 4, slow(1)])
def test_goes_on_with_other_numbers_of_devices(devices: int, uninterrupted: dict[int, Any], tmp_path: Path) -> None:
    """Saved on 8; on 8 again bit for bit, on 4 and on one with the same numbers."""
    mesh = mesh_of(8)
    param = drawn(0, mesh)
    trained = go_on(param, optimizer_of().init(param), mesh, range(HALF))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", trained)
    there = mesh_of(devices)
    fresh = drawn(0, there)
    target = jax.tree.map(lambda leaf: as_placed(leaf, there), (fresh, optimizer_of().init(fresh)))
    with ocp.StandardCheckpointer() as checkpointer:
        param, state = checkpointer.restore(tmp_path / "half", target)
    param, _ = go_on(param, state, there, range(HALF, STEPS))
    for name in SHAPES:
        if devices == 8:
            np.testing.assert_array_equal(param[name], uninterrupted[8][name])
        assert_same(param[name], np.asarray(uninterrupted[1][name]))
        assert param[name].sharding.mesh.size == devices
