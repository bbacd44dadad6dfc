"""What flora is combined with: optax's wrappers, module libraries, checkpoints."""

from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from floragrad.jax import MatrixAxes, flora, scale_by_flora
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("unoptimized")

PARAMS = {
    "embed": jnp.asarray(np.random.default_rng(0).normal(size=(200, 16)), jnp.float32),
    "kernel": jnp.asarray(np.random.default_rng(1).normal(size=(16, 48)), jnp.float32),
    "bias": jnp.ones(48),
}


def grads_at(step: int) -> Any:
    generator = np.random.default_rng(100 + step)
    return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32), PARAMS)


def course(optimizer: optax.GradientTransformation, steps: int = 5, params: Any = PARAMS) -> Any:
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for at in range(steps):
        updates, state = step(jax.tree.map(lambda grad, _: grad, grads_at(at), params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def options(**changes: Any) -> dict[str, Any]:
    return {"learning_rate": 1e-2, "ratio": 4, "kappa": 2, "mu_dtype": "float32"} | changes


@pytest.mark.parametrize("name", ["multi_transform", slow("masked")])
def test_a_leaf_in_a_group_of_its_own_moves_as_by_itself(name: str) -> None:
    """Groups number their leaves themselves: a lone leaf is the first one, in its group as by itself."""
    if name == "multi_transform":
        groups = {"flora": flora(**options()), "sgd": optax.sgd(0.1)}
        together = optax.multi_transform(groups, {"embed": "sgd", "kernel": "flora", "bias": "sgd"})
    else:
        mask = {"embed": False, "kernel": True, "bias": False}
        together = optax.masked(flora(**options()), mask)
    found = course(together)
    state, kernel, optimizer = flora(**options()).init(PARAMS["kernel"]), PARAMS["kernel"], flora(**options())
    update = jax.jit(optimizer.update)
    for step in range(5):
        updates, state = update(grads_at(step)["kernel"], state, kernel)
        kernel = optax.apply_updates(kernel, updates)
    np.testing.assert_allclose(found["kernel"], kernel, rtol=1e-5, atol=1e-6)


def test_a_tree_of_axes_meets_a_masked_tree() -> None:
    axes = {"embed": MatrixAxes(), "kernel": MatrixAxes(-1, -2), "bias": None}
    mask = {"embed": False, "kernel": True, "bias": True}
    state = optax.masked(scale_by_flora(ratio=4, mu_dtype="float32", matrix_axes=axes), mask).init(PARAMS)
    assert state.inner_state.mu["kernel"].shape == (16, 12)


@pytest.mark.parametrize(
    "axes",
    [
        {"embed": None, "kernel": MatrixAxes(-1, -2), "bias": None},
        lambda params: jax.tree.map(lambda leaf: MatrixAxes(-1, -2) if leaf.shape == (16, 48) else None, params),
        MatrixAxes(-1, -2),
    ],
    ids=["tree", "function", "one-for-all"],
)
def test_axes_are_a_tree_a_function_or_one(axes: Any) -> None:
    mu = scale_by_flora(ratio=4, mu_dtype="float32", matrix_axes=axes).init(PARAMS).mu
    assert (mu["kernel"].shape, mu["bias"].shape) == ((16, 12), (48,))


def test_apply_if_finite_skips_a_step_and_goes_on() -> None:
    optimizer = optax.apply_if_finite(flora(**options(mu_dtype="int8")), 3)
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    _, state = update(grads_at(0), state, PARAMS)
    broken = jax.tree.map(lambda grad: grad.at[(0,) * grad.ndim].set(jnp.nan), grads_at(1))
    updates, skipped = update(broken, state, PARAMS)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (state.inner_state, skipped.inner_state))))
    updates, after = update(grads_at(2), skipped, PARAMS)
    expected, _ = update(grads_at(2), state, PARAMS)
    assert_close(updates, expected)
    assert int(after.inner_state[1].count) == 2


def test_multi_steps_average_before_it() -> None:
    """Two halves of a gradient in optax's own accumulation are one step with the whole."""
    doubled = optax.MultiSteps(flora(**options()), 2)
    state, update, params = doubled.init(PARAMS), jax.jit(doubled.update), PARAMS
    for step in range(4):
        updates, state = update(grads_at(step // 2), state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, course(flora(**options()), 2))


def test_a_schedule_is_the_rate_of_each_step() -> None:
    rates = [1e-2, 5e-3, 2e-3]
    found = course(flora(**options(learning_rate=lambda count: jnp.asarray(rates)[count])), 3)
    optimizer = optax.inject_hyperparams(flora, static_args=("rank", "ratio", "min_dim_size_to_factor"))(**options())
    state, params, update = optimizer.init(PARAMS), PARAMS, jax.jit(optimizer.update)
    for step, rate in enumerate(rates):
        state.hyperparams["learning_rate"] = jnp.asarray(rate)
        updates, state = update(grads_at(step), state, params)
        params = optax.apply_updates(params, updates)
    assert_close(found, params)


def test_weight_decay_and_its_mask() -> None:
    """With gradients of zero only what decays moves, by the rate times the decay."""
    optimizer = flora(
        **options(weight_decay=0.1, weight_decay_mask=lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree))
    )
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(PARAMS), PARAMS)
    assert_close(updates, jax.tree.map(lambda p: -1e-3 * p if p.ndim > 1 else 0 * p, PARAMS))


def test_state_is_found_and_mapped_as_optax_does() -> None:
    optimizer = flora(**options())
    state = optimizer.init(PARAMS)
    assert int(optax.tree.get(state, "ScaleByFloraState").count) == 0
    mapped = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state)
    assert float(mapped[1].mu["kernel"][0, 0]) == 1
    assert int(mapped[1].count) == 0


def test_a_tree_without_leaves_is_stepped() -> None:
    optimizer = flora(**options())
    updates, state = optimizer.update({}, optimizer.init({}), {})
    assert updates == {}
    assert int(optax.tree.get(state, "ScaleByFloraState").count) == 1


def test_orbax_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Across the end of an epoch, with every buffer that a state can have."""
    optimizer = flora(**options(projection="adaptive", mu_dtype="int4"))
    update = jax.jit(optimizer.update)

    def go_on(params: Any, state: Any, steps: range) -> Any:
        for step in steps:
            updates, state = update(grads_at(step), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    saved = go_on(PARAMS, optimizer.init(PARAMS), range(3))
    whole = go_on(*saved, range(3, 7))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: (PARAMS, optimizer.init(PARAMS)))
        resumed = go_on(*checkpointer.restore(tmp_path / "state", abstract), range(3, 7))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (whole, resumed))))


# --- Module libraries: each fits the same line, to a loss that no step at all would not reach (NNX: test_modules.py)

X = jnp.asarray(np.random.default_rng(5).normal(size=(64, 16)), jnp.float32)
Y = X @ jnp.asarray(np.random.default_rng(6).normal(size=(16, 8)), jnp.float32)
STEPS, START, GOAL = 150, 5.0, 1e-3
RATE = optax.cosine_decay_schedule(5e-2, STEPS)


def test_flax_linen() -> None:
    model = nn.Sequential([nn.Dense(32), nn.Dense(8)])
    params = model.init(jax.random.key(0), X)
    assert_fits(params, lambda params: jnp.mean((model.apply(params, X) - Y) ** 2))


def test_equinox() -> None:
    """Its layers are (out, in), as PyTorch's are."""
    keys = jax.random.split(jax.random.key(0))
    layers = [eqx.nn.Linear(16, 32, key=keys[0]), eqx.nn.Linear(32, 8, key=keys[1])]
    params, static = eqx.partition(eqx.nn.Sequential(layers), eqx.is_inexact_array)

    def loss(params: Any) -> jax.Array:
        return jnp.mean((jax.vmap(eqx.combine(params, static))(X) - Y) ** 2)

    axes = MatrixAxes(reduction_axis=-1, output_axis=-2)
    assert flora(RATE, ratio=4, matrix_axes=axes).init(params)[1].mu.layers[0].weight.shape == (32, 4)
    assert_fits(params, loss, matrix_axes=axes)


def assert_fits(params: Any, loss: Any, **given: Any) -> None:
    optimizer = flora(RATE, ratio=4, **given)

    def step(carried: Any, _: Any) -> Any:
        params, state = carried
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    _, values = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS))(params)
    assert values[0] > START
    assert values[-1] < GOAL
