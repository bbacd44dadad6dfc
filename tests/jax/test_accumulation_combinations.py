"""compressed_multi_steps with the rest of the JAX world."""

from functools import cache
from pathlib import Path
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx

from floragrad.jax import compressed_multi_steps
from tests.jax.accumulation_cases import assert_equal, pair
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("unoptimized")

STEPS = 4


def grads(step: int) -> Any:
    return pair(100 + step)


def labels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", params)


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


@cache
def step_of(optimizer: Any) -> Any:
    """One program for all runs of an optimizer."""

    @jax.jit
    def step(params: Any, state: Any, given: Any) -> Any:
        updates, state = optimizer.update(given, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(optimizer: Any, state: Any, steps: range) -> tuple[Any, Any]:
    """Parameters and state after these micro-batches."""
    params, step = pair(0), step_of(optimizer)
    for number in steps:
        params, state = step(params, state, grads(number))
    return params, state


def windows(inner: Any, **options: Any) -> Any:
    return compressed_multi_steps(inner, 2, **options)


PLAIN = windows(optax.sgd(0.1, momentum=0.9))
ADAM = windows(optax.adam(1e-2))
COMBINED = {
    "inject_hyperparams": windows(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)),
    "injected around": optax.inject_hyperparams(lambda learning_rate: windows(optax.sgd(learning_rate, momentum=0.9)))(
        learning_rate=0.1
    ),
    "schedule": windows(optax.sgd(optax.constant_schedule(0.1), momentum=0.9)),
    "multi_transform": windows(
        optax.multi_transform({"matrix": optax.sgd(0.1, momentum=0.9), "vector": optax.sgd(0.1, momentum=0.9)}, labels)
    ),
    "apply_if_finite inside": windows(optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 3)),
    "apply_if_finite around": optax.apply_if_finite(PLAIN, 3),
    "chain": optax.chain(optax.identity(), PLAIN),
}


@pytest.fixture(scope="module")
def plain() -> Any:
    return run(PLAIN, PLAIN.init(pair(0)), range(STEPS))[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("schedule", "chain") else ()) for name in COMBINED]
)
def test_combined_it_does_what_it_does_alone(name: str, plain: Any) -> None:
    """Bit for bit, but for a learning rate that is an array: one rounding of the update, 2⁻²⁴ of 0.1 · 4."""
    optimizer = COMBINED[name]
    found, _ = run(optimizer, optimizer.init(pair(0)), range(STEPS))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=2.0**-22, atol=2.0**-22)


def test_masked() -> None:
    """What is masked has no sketch, and its updates pass as they are."""
    optimizer = optax.masked(PLAIN, matrices)
    state = optimizer.init(pair(0))
    assert isinstance(state.inner_state.acc_grads.payload["bias"], optax.MaskedNode)
    updates, _ = jax.jit(optimizer.update)(grads(0), state, pair(0))
    np.testing.assert_array_equal(updates["bias"], grads(0)["bias"])
    assert not np.asarray(updates["kernel"]).any()


def test_scan_with_donated_buffers() -> None:
    """Two windows in one scan, everything donated, are the four steps one by one."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(grads, range(STEPS)))

    def epoch(params: Any, state: Any, stacked: Any) -> Any:
        def body(carry: Any, given: Any) -> Any:
            updates, state = PLAIN.update(given, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (params, state), stacked)[0]

    given = pair(0), PLAIN.init(pair(0))
    found = jax.jit(epoch, donate_argnums=(0, 1))(*given, stacked)
    assert given[1].acc_grads.payload["kernel"].is_deleted()
    expected = run(PLAIN, PLAIN.init(pair(0)), range(STEPS))
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(one, other, rtol=2.0**-22, atol=2.0**-22)


def test_replicas() -> None:
    """vmap over two replicas with gradients of their own: the second's are the first's of other steps."""
    params = {"kernel": pair(0)["kernel"]}
    replicas = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    optimizer = windows(optax.sgd(-1.0), state_dtype="float32")
    state = jax.vmap(optimizer.init)(replicas)
    update = jax.jit(jax.vmap(optimizer.update))
    for step in range(2):
        given = {"kernel": jnp.stack([grads(step)["kernel"], 2 * grads(step)["kernel"]])}
        updates, state = update(given, state, replicas)
    mean = (np.asarray(grads(0)["kernel"]) + np.asarray(grads(1)["kernel"])) / 2
    np.testing.assert_allclose(updates["kernel"][0], mean, atol=1e-6)
    np.testing.assert_allclose(updates["kernel"][1], 2 * mean, atol=2e-6)


@pytest.mark.parametrize("cut", [1, slow(3)])
def test_orbax_resumes_inside_a_window(tmp_path: Path, cut: int) -> None:
    """Bit for bit, in int4, from after the first micro-batch of a window."""
    whole = run(ADAM, ADAM.init(pair(0)), range(STEPS))
    _, state = run(ADAM, ADAM.init(pair(0)), range(cut))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(ADAM.init, pair(0)))
    assert_equal(restored, state)
    _, resumed = run(ADAM, restored, range(cut, STEPS))
    assert_equal(resumed, whole[1])


def test_flax_nnx() -> None:
    """Inside nnx.Optimizer and nnx.jit: a layer moves at the second micro-batch, and not before."""
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, windows(optax.sgd(0.1)), wrt=nnx.Param)
    start = np.asarray(model.kernel[...])

    @nnx.jit
    def step(model: Any, optimizer: Any, inputs: Any) -> None:
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(jnp.square(model(inputs))))(model))

    moved = []
    for seed in range(2):
        step(model, optimizer, jax.random.normal(jax.random.key(seed), (8, 64)))
        moved.append(float(np.abs(np.asarray(model.kernel[...]) - start).max()))
    assert moved[0] == 0
    assert moved[1] > 1e-4


def test_equinox() -> None:
    """With a module's arrays as parameters, None where it has none."""
    model = equinox.nn.MLP(64, 64, 64, 1, key=jax.random.key(0))
    optimizer = windows(optax.sgd(0.1))
    state = optimizer.init(equinox.filter(model, equinox.is_array))

    @equinox.filter_jit
    def step(model: Any, state: Any, inputs: Any) -> Any:
        given = equinox.filter_grad(lambda model: jnp.mean(jnp.square(jax.vmap(model)(inputs))))(model)
        updates, state = optimizer.update(given, state, equinox.filter(model, equinox.is_array))
        return equinox.apply_updates(model, updates), state

    start = np.asarray(model.layers[0].weight)
    moved = []
    for seed in range(2):
        model, state = step(model, state, jax.random.normal(jax.random.key(seed), (8, 64)))
        moved.append(float(np.abs(np.asarray(model.layers[0].weight) - start).max()))
    assert moved[0] == 0
    assert moved[1] > 1e-5
