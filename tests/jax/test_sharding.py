"""Eight devices compute what one does; state lies as its parameter does; sharded outputs never move."""

import re
from functools import cache
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from floragrad.jax import flora

pytestmark = pytest.mark.usefixtures("unoptimized")

KERNEL, EXPERTS, EMBEDDING = (64, 96), (8, 32, 48), (320, 48)
OUTPUTS = {
    "outputs": (KERNEL, PartitionSpec(None, "x")),
    "stack": (EXPERTS, PartitionSpec("x", None, None)),
    "stacked-outputs": (EXPERTS, PartitionSpec(None, None, "x")),
    "vocabulary": (EMBEDDING, PartitionSpec("x", None)),
}
INPUTS = {
    "inputs": (KERNEL, PartitionSpec("x", None)),
    "stacked-inputs": (EXPERTS, PartitionSpec(None, "x", None)),
    "features": (EMBEDDING, PartitionSpec(None, "x")),
}
KINDS: dict[str, dict[str, Any]] = {
    "sign": {"ratio": 6},
    "adaptive": {"ratio": 4, "projection": "adaptive"},
    "gaussian": {"ratio": 4, "projection": "gaussian"},
    "whole": {"ratio": 1, "factored": False},
    "int8": {"ratio": 4, "mu_dtype": "int8"},
}
STEPS = 4  # two epoch changes
MODES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


def combined(shapes: dict[str, tuple[Any, PartitionSpec]], quick: dict[str, set[str]]) -> Any:
    """Shapes × modes × kinds: all with ``make test-slow``, some of them with ``make test``.

    Args:
        shapes: With their shardings.
        quick: Shapes and modes that always run, as ``"shape-mode"``, for each kind of momentum.
    """
    rows = []
    for (name, (shape, spec)), (mode_name, mode), kind in product(shapes.items(), MODES.items(), quick):
        marks = () if f"{name}-{mode_name}" in quick[kind] else pytest.mark.slow
        rows.append(pytest.param(shape, spec, mode, kind, id=f"{name}-{mode_name}-{kind}", marks=marks))
    return pytest.mark.parametrize(("shape", "spec", "mode", "kind"), rows)


def optimizer_of(kind: str) -> optax.GradientTransformation:
    shared = {"kappa": 2, "mu_dtype": "float32", "embedding_momentum": "compressed"}
    return flora(1e-2, **(shared | KINDS[kind]))


def numbers(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def step_of(optimizer: optax.GradientTransformation) -> Any:
    def step(param: Any, state: Any, grad: Any) -> Any:
        updates, state = optimizer.update(grad, state, param)
        return optax.apply_updates(param, updates), state

    return jax.jit(step)


def mesh_of(mode: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("x",), axis_types=(mode,))


@cache
def alone(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Where one device arrives."""
    optimizer, param = optimizer_of(kind), numbers(shape, 0)
    state, step = optimizer.init(param), step_of(optimizer)
    for at in range(STEPS):
        param, state = step(param, state, numbers(shape, at + 1))
    return np.asarray(param)


def assert_same(found: jax.Array, expected: np.ndarray) -> None:
    assert np.abs(np.asarray(found) - expected).max() <= 1e-5 * np.abs(expected).max()


def moved(compiled: str) -> list[tuple[str, int]]:
    """Every gather, exchange or permutation of a compiled program, and how many numbers its result has."""
    kinds = "all-gather|all-to-all|collective-permute|ragged-all-to-all|collective-broadcast"
    found = re.findall(rf"= \(?\w+\[([\d,]*)\]\S* .*?\b({kinds})(?:-start)?\(", compiled)
    return [(name, prod(int(size) for size in sizes.split(",") if size)) for sizes, name in found]


@combined(
    OUTPUTS,
    {
        "sign": {"outputs-automatic", "stack-explicit", "stacked-outputs-automatic", "vocabulary-explicit"},
        "adaptive": {"outputs-automatic"},
        "gaussian": {"stack-explicit"},
        "whole": {"outputs-explicit"},
    },
)
def test_sharded_outputs_stay_where_they_are(
    shape: tuple[int, ...], spec: PartitionSpec, mode: AxisType, kind: str
) -> None:
    """The compiled step gathers, exchanges and permutes nothing of a shard's size, and computes what one device does.

    It is compiled once, for the shardings that the state is born with: had a step changed one, the next would be
    refused.
    """
    mesh = mesh_of(mode)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        optimizer, param = optimizer_of(kind), jax.device_put(numbers(shape, 0), sharding)
        state = optimizer.init(param)
        compiled = step_of(optimizer).lower(param, state, param).compile()
        for at in range(STEPS):
            param, state = compiled(param, state, jax.device_put(numbers(shape, at + 1), sharding))
    assert_same(param, alone(shape, kind))
    program = compiled.as_text()
    assert "all-reduce" in program  # of the second moment's sums and of the norm: this is a program of eight
    assert [each for each in moved(program) if each[1] >= prod(shape) // 8] == []


@combined(
    OUTPUTS, {"int8": {"outputs-explicit", "stack-automatic", "stacked-outputs-explicit", "vocabulary-automatic"}}
)
def test_the_momentum_lies_as_its_parameter_does(
    shape: tuple[int, ...], spec: PartitionSpec, mode: AxisType, kind: str
) -> None:
    """In 8 bits, payload and scales are shards of an eighth, at birth and after a step; they stay there too."""
    mesh = mesh_of(mode)
    with jax.set_mesh(mesh):
        optimizer, param = optimizer_of(kind), jax.device_put(numbers(shape, 0), NamedSharding(mesh, spec))
        state = optimizer.init(param)
        compiled = step_of(optimizer).lower(param, state, param).compile()
        _, after = compiled(param, state, param)
    for kept in jax.tree.leaves((state[1][1:-1], after[1][1:-1])):  # all but projection_id
        assert prod(kept.sharding.shard_shape(kept.shape)) == kept.size // 8
    assert [each for each in moved(compiled.as_text()) if each[1] >= prod(shape) // 8] == []


@combined(
    INPUTS,
    {
        "sign": {"inputs-automatic", "stacked-inputs-explicit", "features-automatic"},
        "adaptive": {"stacked-inputs-explicit"},
    },
)
def test_sharded_inputs_give_the_same_numbers(
    shape: tuple[int, ...], spec: PartitionSpec, mode: AxisType, kind: str
) -> None:
    mesh = mesh_of(mode)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        optimizer, param = optimizer_of(kind), jax.device_put(numbers(shape, 0), sharding)
        state, step = optimizer.init(param), step_of(optimizer)
        for at in range(STEPS):
            param, state = step(param, state, jax.device_put(numbers(shape, at + 1), sharding))
    assert_same(param, alone(shape, kind))
    assert param.sharding.shard_shape(shape) == sharding.shard_shape(shape)


def test_a_gather_is_seen() -> None:
    """What the test above looks for is found where it is: a step that gathers on purpose."""
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        param = jax.device_put(numbers(KERNEL, 0), NamedSharding(mesh, PartitionSpec(None, "x")))
        whole = NamedSharding(mesh, PartitionSpec())
        gather = jax.jit(lambda array: jnp.sort(array, axis=1), out_shardings=whole)
        assert ("all-gather", prod(KERNEL)) in moved(gather.lower(param).compile().as_text())


def test_bfloat16_parameters_are_born_sharded_too() -> None:
    mesh = mesh_of(AxisType.Auto)
    param = jax.device_put(numbers(KERNEL, 0).astype(jnp.bfloat16), NamedSharding(mesh, PartitionSpec(None, "x")))
    assert optimizer_of("sign").init(param)[1].mu.sharding.spec == PartitionSpec(None, "x")
