"""On eight devices: sketches lie where gradients do, and nothing of a parameter's size is sent."""

import re
from functools import cache, partial
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from floragrad.jax import compressed_multi_steps, sketch_accumulator

pytestmark = pytest.mark.usefixtures("unoptimized")

SHAPES = {"kernel": (512, 128), "embedding": (512, 64), "stack": (8, 128, 64), "bias": (64,)}
SPECS = {
    "outputs": {"kernel": (None, "x"), "embedding": ("x", None), "stack": (None, None, "x"), "bias": ("x",)},
    "inputs": {"kernel": ("x", None), "embedding": ("x", None), "stack": ("x", None, None), "bias": (None,)},
}
COLLECTIVE = re.compile(r"= .*?\b(?:all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)(?:-start)?\(")
QUICK = {("int4", "outputs", AxisType.Explicit), ("int4", "inputs", AxisType.Auto)}


def types_of_axes(quick: AxisType) -> Any:
    """Both, one of them with ``make test-slow`` only."""
    rows = [
        pytest.param(each, marks=() if each is quick else pytest.mark.slow)
        for each in (AxisType.Auto, AxisType.Explicit)
    ]
    return pytest.mark.parametrize("types", rows, ids=["auto", "explicit"])


def drawn(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}


def placed(tree: dict[str, Any], mesh: Any, specs: dict[str, tuple[str | None, ...]]) -> dict[str, jax.Array]:
    return {name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*specs[name]))) for name, leaf in tree.items()}


def sent(compiled: Any) -> list[str]:
    """The collective operations of a program, one line of HLO for each."""
    return [line.strip() for line in compiled.as_text().splitlines() if COLLECTIVE.search(line)]


def largest(line: str) -> int:
    """The numbers of the largest array that a line of HLO names."""
    return max(prod(int(size) for size in shape.split(",") if size) for shape in re.findall(r"\[([\d,]*)\]", line))


@cache
def alone(state_dtype: Any) -> Any:
    """The update after a window of three on one device."""
    optimizer = compressed_multi_steps(optax.sgd(1.0), 3, state_dtype=state_dtype)
    step, updates = jax.jit(optimizer.update), drawn(0)
    state = optimizer.init(updates)
    for number in range(3):
        updates, state = step(drawn(number), state)
    return updates


@pytest.mark.parametrize(
    ("state_dtype", "sharded", "types"),
    [
        pytest.param(dtype, sharded, types, marks=() if (dtype, sharded, types) in QUICK else pytest.mark.slow)
        for dtype, sharded, types in product(["int4", "float32"], SPECS, [AxisType.Auto, AxisType.Explicit])
    ],
)
def test_every_column_kept(state_dtype: str, sharded: str, types: AxisType) -> None:
    """At ρ = 1 nothing at all is sent, whatever is sharded; a window gives the numbers of one device.

    A quotient that is rounded in another place may cross an integer, by one step of int4: a seventh of the
    block's largest number, in fewer than one number of 2¹⁴ (see test_quantize.py).
    """
    mesh, specs = jax.make_mesh((8,), ("x",), axis_types=(types,)), SPECS[sharded]
    optimizer = compressed_multi_steps(optax.sgd(1.0), 3, state_dtype=state_dtype)
    with jax.set_mesh(mesh):
        state = optimizer.init(placed(drawn(0), mesh, specs))
        compiled = jax.jit(optimizer.update).lower(placed(drawn(0), mesh, specs), state).compile()
        for number in range(3):
            updates, state = compiled(placed(drawn(number), mesh, specs), state)
    assert not sent(compiled)
    single = alone(state_dtype)
    for name, update in updates.items():
        assert update.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*specs[name])), update.ndim)
        for buffer in jax.tree.leaves((state.acc_grads.payload[name], state.acc_grads.scale[name])):
            assert buffer.addressable_shards[0].data.size * 8 == buffer.size or name == "bias"
        apart = np.abs(np.asarray(update) - np.asarray(single[name]))
        if state_dtype == "float32" or name == "bias":
            assert apart.max() <= 1e-6
        else:
            assert (apart > 1e-6).mean() <= 2 * 2.0**-14
            assert apart.max() <= 2 * np.abs(np.asarray(single[name])).max() / 7 * 1.2


@types_of_axes(quick=AxisType.Auto)
def test_sketches_of_sharded_outputs(types: AxisType) -> None:
    """At ρ = 4 rows stay where they are too: nothing is sent where the outputs are sharded."""
    mesh, specs = jax.make_mesh((8,), ("x",), axis_types=(types,)), SPECS["outputs"]
    optimizer = compressed_multi_steps(optax.sgd(1.0), 2, ratio=4, state_dtype="float32")
    with jax.set_mesh(mesh):
        params = placed(drawn(0), mesh, specs)
        state = optimizer.init(params)
        compiled = jax.jit(optimizer.update).lower(params, state).compile()
        for number in range(2):
            updates, state = compiled(placed(drawn(number), mesh, specs), state)
    assert not sent(compiled)
    single = optimizer.init(drawn(0))
    for number in range(2):
        expected, single = jax.jit(optimizer.update)(drawn(number), single)
    assert state.acc_grads.payload["kernel"].shape == (128, 128)
    for name, update in updates.items():
        np.testing.assert_allclose(update, expected[name], rtol=0, atol=1e-5)


def test_sketches_of_sharded_inputs_send_no_more_than_sketches() -> None:
    """Automatic sharding, ρ = 4: parts of a sketch are summed over devices; no parameter is gathered."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    optimizer = compressed_multi_steps(optax.sgd(1.0), 2, ratio=4, state_dtype="float32")
    grads = placed({"kernel": drawn(0)["kernel"]}, mesh, SPECS["inputs"])
    state = optimizer.init(grads)
    compiled = jax.jit(optimizer.update).lower(grads, state).compile()
    assert max(map(largest, sent(compiled)), default=0) <= grads["kernel"].size // 4


@types_of_axes(quick=AxisType.Explicit)
def test_inside_optax_microbatching(types: AxisType) -> None:
    """Weights sharded along their outputs, inside a loop: what is sent is the same as with exact sums.

    The batch is on every device: optax 0.2.8 takes jax 0.10 for older than 0.7 ("0.10.2" < "0.7.0", as text) and
    cannot cut an explicitly sharded one.
    """
    mesh = jax.make_mesh((8,), ("x",), axis_types=(types,))
    batch = np.random.default_rng(1).standard_normal((32, 512), dtype=np.float32)

    def loss(kernel: Any, inputs: Any) -> Any:
        return jnp.mean(jnp.square(inputs @ kernel))

    def gradient(accumulator: Any, kernel: Any, inputs: Any) -> Any:
        micro = optax.microbatching.microbatch(jax.grad(loss), 1, 8, accumulator)
        return micro(kernel, inputs)

    sketched = sketch_accumulator(jax.random.key(0), 4, state_dtype="float32")
    programs = {}
    with jax.set_mesh(mesh):
        kernel = jax.device_put(drawn(0)["kernel"], NamedSharding(mesh, PartitionSpec(None, "x")))
        for name, accumulator in (("exact", optax.microbatching.AccumulationType.MEAN), ("ours", sketched)):
            programs[name] = jax.jit(partial(gradient, accumulator)).lower(kernel, batch).compile()
        exact, ours = (program(kernel, batch) for program in programs.values())
    assert ours.sharding.is_equivalent_to(exact.sharding, 2)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-6 * np.abs(np.asarray(exact)).max())
    assert len(sent(programs["ours"])) == len(sent(programs["exact"]))
