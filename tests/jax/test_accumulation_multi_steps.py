"""compressed_multi_steps: optax.MultiSteps with sketches, and what it does better."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from floragrad.jax import compressed_multi_steps
from floragrad.jax.quantize import Stored
from tests.jax.accumulation_cases import assert_close, assert_equal, pair, tree
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("unoptimized")


def grads(step: int, like: Any = pair) -> Any:
    return like(100 + step)


def run(optimizer: Any, steps: int, given: Any = grads, like: Any = pair) -> tuple[list[Any], Any]:
    """The updates of every micro-batch, and the last state, from one compiled program."""
    params = like(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    found = []
    for step in range(steps):
        updates, state = update(given(step), state, params)
        found.append(updates)
    assert update._cache_size() == 1
    return found, state


@pytest.mark.parametrize(
    ("every", "options", "steps"),
    [
        slow(3, {}, 6, id="mean"),
        pytest.param(3, {"use_grad_mean": False}, 3, id="sum"),
        pytest.param(lambda step: 1 + step, {}, 6, id="schedule"),  # windows of 1, 2 and 3
    ],
)
def test_every_column_in_float32_equals_multi_steps(every: Any, options: dict[str, Any], steps: int) -> None:
    """Means of three are rounded in another order, by a few 2⁻²⁴ of the largest number; the momentum is linear."""
    inner = optax.sgd(1e-2, momentum=0.9)
    given = partial(grads, like=tree), tree
    ours, state = run(compressed_multi_steps(inner, every, **options, state_dtype="float32"), steps, *given)
    exact, expected = run(optax.MultiSteps(inner, every, **options), steps, *given)
    for one, other in zip(ours, exact, strict=True):
        assert_close(one, other, 1e-6)
    assert_close(state.inner_opt_state, expected.inner_opt_state, 1e-6)
    assert_equal((state.mini_step, state.gradient_step), (expected.mini_step, expected.gradient_step))


def test_the_state_is_that_of_multi_steps() -> None:
    optimizer = compressed_multi_steps(optax.sgd(1.0), 2)
    state = optimizer.init(pair(0))
    assert isinstance(state, optax.MultiStepsState)
    assert isinstance(state.acc_grads, Stored)
    assert state.acc_grads.payload.keys() == state.acc_grads.scale.keys() == pair(0).keys()
    assert optimizer.gradient_transformation() is optimizer
    flags, update = [], jax.jit(optimizer.update)
    for step in range(4):
        _, state = update(grads(step), state)
        flags.append(bool(optimizer.has_updated(state)))
    assert flags == [False, True, False, True]
    assert (int(state.mini_step), int(state.gradient_step)) == (0, 2)


def test_the_last_gradient_is_whole() -> None:
    """After gradients of zeros, and in windows of one, nothing is rounded: bit for bit what is given."""
    for every, like in ((1, pair), (3, tree)):
        optimizer = compressed_multi_steps(optax.sgd(-1.0), every, use_grad_mean=False, ratio=3)
        last = grads(every - 1, like)
        zeros = jax.tree.map(jnp.zeros_like, last)
        updates, _ = run(optimizer, every, [*[zeros] * (every - 1), last].__getitem__, like)
        assert_equal(updates[-1], last)


def test_the_inner_optimizer_is_not_called_on_mini_steps() -> None:
    """A callback in it counts; the compiled program keeps the branch."""
    calls: list[int] = []

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    optimizer = compressed_multi_steps(optax.GradientTransformation(lambda _: optax.EmptyState(), update), 3)
    run(optimizer, 8)
    jax.effects_barrier()
    assert len(calls) == 2


@pytest.mark.parametrize(
    "should_skip",
    [
        slow(optax.skip_not_finite, id="not-finite"),
        pytest.param(partial(optax.skip_large_updates, max_squared_norm=1e6), id="large"),
    ],
)
def test_skipped_micro_batches_never_happened(should_skip: Any) -> None:
    """Skipped first, in the middle and as the last of a window: the others give what they give alone."""
    bad = jax.tree.map(lambda each: each.at[..., :1].set(jnp.nan) if each.ndim else each, grads(0))
    order = [None, 0, None, 1, None, 2, 3]
    optimizer = compressed_multi_steps(optax.adam(1e-2), 2, should_skip_update_fn=should_skip)
    found, state = run(optimizer, len(order), lambda step: bad if order[step] is None else grads(order[step]))
    alone, expected = run(optimizer, 4)
    assert_equal([updates for updates, at in zip(found, order, strict=True) if at is not None], alone)
    assert_equal(state, expected)
    for updates, at in zip(found, order, strict=True):
        if at is None:
            assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))


def test_what_a_skip_notes_is_kept() -> None:
    optimizer = compressed_multi_steps(optax.sgd(1.0), 2, should_skip_update_fn=optax.skip_not_finite)
    state = optimizer.init(pair(0))
    bad = {**grads(0), "bias": jnp.full(64, jnp.inf)}
    _, state = jax.jit(optimizer.update)(bad, state)
    assert bool(state.skip_state["should_skip"])
    assert int(state.skip_state["num_not_finite"]) == 64


@pytest.mark.parametrize("returned", [0, jnp.zeros(3, bool)], ids=["integer", "vector"])
def test_a_skip_that_is_no_boolean_is_refused(returned: Any) -> None:
    optimizer = compressed_multi_steps(optax.sgd(1.0), 2, should_skip_update_fn=lambda *_: (returned, ()))
    state = optimizer.init(pair(0))
    with pytest.raises(ValueError, match="must return a boolean scalar"):
        optimizer.update(grads(0), state)


def test_what_is_not_finite_does_not_outlive_its_window() -> None:
    """Window one is spoilt, in the leaves concerned and there only; window two is as if it had been the first."""
    spoilt = {**grads(0), "kernel": grads(0)["kernel"].at[0, 0].set(jnp.nan)}
    optimizer = compressed_multi_steps(optax.sgd(1.0), 2)
    found, _ = run(optimizer, 4, lambda step: spoilt if step == 0 else grads(step))
    clean, _ = run(optimizer, 4)
    assert np.isnan(np.asarray(found[1]["kernel"])).any()
    assert_equal({**found[1], "kernel": 0.0 * clean[1]["kernel"]}, {**clean[1], "kernel": 0.0 * clean[1]["kernel"]})
    assert_equal(found[3], clean[3])


def test_windows_round_differently() -> None:
    """The same three gradients in two windows: other bits, or the errors of training would add up."""
    optimizer = compressed_multi_steps(optax.sgd(1.0), 3)
    found, _ = run(optimizer, 6, lambda step: grads(step % 3))
    assert (np.asarray(found[2]["kernel"]) != np.asarray(found[5]["kernel"])).mean() > 0.5
    other, _ = run(compressed_multi_steps(optax.sgd(1.0), 3, seed=1), 3, lambda step: grads(step % 3))
    assert (np.asarray(found[2]["kernel"]) != np.asarray(other[2]["kernel"])).mean() > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_k_schedule": 2**31}, "every_k_schedule=2147483648: must be an integer >= 1"),
        ({"every_k_schedule": 0}, "every_k_schedule=0: must be an integer >= 1, or a function from the gradient step"),
        ({"every_k_schedule": 2, "seed": -1}, "seed=-1: must be an integer from 0 to 2**32 - 1"),
    ],
    ids=["long", "every", "seed"],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compressed_multi_steps(optax.sgd(1.0), **options)
