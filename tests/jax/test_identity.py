"""A sketch is read in the projection that it was written in, wherever and under whatever options it is read."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from floragrad._streams import Stream
from floragrad.jax import ScaleByFloraState, flora, scale_by_flora, upgrade_state
from floragrad.jax.draws import LeafDraws, draw_pools, leaf_draws
from floragrad.jax.leaf import Leaf, init_leaf_state
from floragrad.jax.options import resolve_options
from floragrad.jax.quantize import random_words
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("unoptimized")

SHAPE, STEPS = (16, 24), 5
OPTIONS = [
    slow({"mu_dtype": "float32"}, id="sign"),
    slow({"projection": "gaussian", "mu_dtype": "float32"}, id="gaussian"),
    pytest.param({"projection": "adaptive", "kappa": 2}, id="adaptive"),
    pytest.param({"mu_dtype": "int4", "residual": False}, id="int4"),
]


def grads(step: int, names: str) -> dict[str, jax.Array]:
    generator = np.random.default_rng(step)
    drawn = {name: generator.standard_normal(SHAPE, np.float32) for name in "abx"}
    return {name: jnp.asarray(drawn[name]) for name in names}


def trained(optimizer: optax.GradientTransformation, names: str, steps: int = STEPS) -> Any:
    state, update = optimizer.init(grads(0, names)), jax.jit(optimizer.update)
    for step in range(1, steps):
        _, state = update(grads(step, names), state)
    return state


def moved_by_name(state: ScaleByFloraState, fresh: ScaleByFloraState) -> ScaleByFloraState:
    """A state whose trees have other keys, given by name all that the old one had."""
    parts = [{name: old.get(name, new[name]) for name in new} for old, new in zip(state[1:], fresh[1:], strict=True)]
    return ScaleByFloraState(state.count, *parts)


@pytest.mark.parametrize("options", OPTIONS)
def test_another_tree_goes_on_with_each_tensors_own_projection(options: dict[str, Any]) -> None:
    """Bit for bit over the next epoch's end: positions change, and nothing that is drawn for a tensor does."""
    optimizer = scale_by_flora(ratio=4, **({"kappa": STEPS + 1} | options))
    state = trained(optimizer, "ab")
    other = moved_by_name(state, optimizer.init(grads(0, "xb")))
    assert other.projection_id["b"].tolist()[:2] == [0, 1]
    update = jax.jit(optimizer.update)
    for step in range(STEPS, STEPS + 2):
        expected, state = update(grads(step, "ab"), state)
        found, other = update(grads(step, "bx"), other)
        np.testing.assert_array_equal(found["b"], expected["b"])
        np.testing.assert_array_equal(other.mu["b"], state.mu["b"])


def test_another_partition_goes_on_likewise() -> None:
    """A tensor that is frozen shifts the positions of those behind it in its group."""
    optimizer = scale_by_flora(ratio=4)
    state = trained(optimizer, "ab")
    masked = optax.masked(optimizer, {"a": False, "b": True})
    parts = [tree | {"a": optax.MaskedNode()} for tree in state[1:]]
    frozen = optax.MaskedState(ScaleByFloraState(state.count, *parts))
    found, _ = jax.jit(masked.update)(grads(STEPS, "ab"), frozen)
    expected, _ = jax.jit(optimizer.update)(grads(STEPS, "ab"), state)
    np.testing.assert_array_equal(found["b"], expected["b"])


def test_a_number_compiles_nothing_anew() -> None:
    optimizer = scale_by_flora(ratio=4)
    state, update = optimizer.init(grads(0, "ab")), jax.jit(optimizer.update)
    for ids in (state.projection_id, {"a": state.projection_id["b"], "b": state.projection_id["a"]}):
        update(grads(1, "ab"), state._replace(projection_id=ids))
    assert update._cache_size() == 1


def test_what_is_drawn_together_is_what_each_leaf_draws_by_itself() -> None:
    """Bit for bit, at an epoch's end, for leaves of several shapes, ratios and seeds."""
    options = resolve_options(
        rank=None,
        ratio=3,
        b1=0.9,
        kappa=4,
        projection="sign",
        residual=None,
        seed=3,
        embedding_momentum="none",
        mu_dtype="int8",
        matrix_axes=None,
    )
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(16, 24), (5,), (2, 9, 8), (16, 24), (2, 2)]]
    leaves = [Leaf(options, *each, index) for index, each in enumerate(options.plans(shapes))]
    ids = [init_leaf_state(leaf, None).projection_id for leaf in leaves]

    @jax.jit
    def draw(ids: Any, count: Any) -> list[LeafDraws]:
        pools = draw_pools(leaves, ids, options, count)
        return [leaf_draws(*each) for each in zip(leaves, pools, ids, strict=True)]

    for leaf, drawn in zip(leaves, draw(ids, jnp.int32(8)), strict=True):
        assert (drawn.projection is None) == (leaf.plan.momentum != "sketch")
        if drawn.projection is not None:
            assert drawn.resampled
            np.testing.assert_array_equal(drawn.projection.weight, leaf.draw_projection(2).weight)
            np.testing.assert_array_equal(drawn.previous.weight, leaf.draw_projection(0).weight)
        if leaf.is_random:
            shape = leaf.layout.with_width(leaf.plan.width)
            key = leaf.key(8, Stream.STATE_ROUNDING)
            (expected,) = random_words(key, shape, leaf.layout.axis, 1)
            jax.tree.map(np.testing.assert_array_equal, drawn.words, expected)


# --- Options changed while training --------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "residual"), [({"kappa": 3}, True), ({"seed": 7}, False)], ids=["kappa", "seed"])
def test_injected_options_carry_the_momentum_over(change: dict[str, int], residual: bool) -> None:
    """As at the end of an epoch: M is decoded with the P that it was written with, in float64 here.

    Each element of D is a sum of few products of numbers around 1: 1e-5 bounds their rounding to float32.
    """
    make = optax.inject_hyperparams(scale_by_flora, static_args=("rank", "ratio"))
    optimizer = make(ratio=4, mu_dtype="float32", kappa=1000, residual=residual)
    state, update = optimizer.init(grads(0, "a")), jax.jit(optimizer.update)
    for step in range(1, STEPS):
        _, state = update(grads(step, "a"), state)
    old, new = (projection_of(seed, epoch) for seed, epoch in [(0, 0), (change.get("seed", 0), STEPS // 3)])
    if "kappa" not in change:
        new = projection_of(change["seed"], 0)
    momentum = np.asarray(state.inner_state.mu["a"], np.float64)
    fresh = np.asarray(grads(STEPS, "a")["a"], np.float64)
    state.hyperparams.update({name: jnp.asarray(value) for name, value in change.items()})
    updates, state = update(grads(STEPS, "a"), state)
    assert update._cache_size() <= 2  # a strong dtype in place of a weak one is another type, once
    if residual:
        carried = new @ old.T @ np.linalg.solve(old @ old.T, momentum)
        following = 0.9 * carried + 0.1 * new @ fresh
        expected = fresh + new.T @ np.linalg.solve(new @ new.T, following - new @ fresh)
    else:
        following = 0.9 * new @ old.T @ momentum + 0.1 * new @ fresh
        expected = 0.1 * fresh + 0.9 * old.T @ momentum
    np.testing.assert_allclose(updates["a"], expected, atol=1e-5)
    np.testing.assert_allclose(state.inner_state.mu["a"], following, atol=1e-5)


def projection_of(seed: int, epoch: int) -> np.ndarray:
    """P of the first leaf as JAX's own functions draw it."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), epoch)
    signs = np.asarray(jax.random.rademacher(key, (SHAPE[0],), jnp.float32), np.float64)
    dense = np.zeros((SHAPE[0] // 4, SHAPE[0]))
    dense[np.arange(SHAPE[0]) % len(dense), np.arange(SHAPE[0])] = signs
    return dense


def test_epochs_are_counted_in_integers() -> None:
    """An interval that is injected as a float does not round the step: past 2**24 float32 skips numbers."""
    make = optax.inject_hyperparams(scale_by_flora, static_args=("rank", "ratio"))
    optimizer = make(ratio=4, kappa=1)
    state = optimizer.init(grads(0, "a"))
    state = state._replace(inner_state=state.inner_state._replace(count=jnp.int32(2**24)))
    state.hyperparams["kappa"] = jnp.float32(1)
    _, state = jax.jit(optimizer.update)(grads(1, "a"), state)
    assert state.inner_state.projection_id["a"].tolist() == [0, 0, 2**24 + 1]


# --- States of earlier versions ------------------------------------------------------------------------------


class Earlier(NamedTuple):
    """The state before ``projection_id``."""

    count: Any
    mu: Any
    mu_scale: Any
    projection_weight: Any


def as_earlier(state: Any) -> Any:
    return jax.tree.map(lambda each: Earlier(*each[:-1]) if _is_ours(each) else each, state, is_leaf=_is_ours)


def _is_ours(tree: Any) -> bool:
    return isinstance(tree, ScaleByFloraState)


@pytest.mark.parametrize("restored", ["orbax", "as it was"])
def test_an_earlier_state_goes_on_bit_for_bit(restored: str, tmp_path: Path) -> None:
    optimizer = flora(1e-2, ratio=4, kappa=3)
    params = grads(0, "ab")
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(1, STEPS):
        _, state = update(grads(step, "ab"), state, params)
    saved = as_earlier(state)
    if restored == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", saved)
            checkpointer.wait_until_finished()
            saved = checkpointer.restore(tmp_path / "state")
    found = upgrade_state(saved, optimizer.init(params), kappa=3)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_an_earlier_state_is_refused_by_name() -> None:
    optimizer = scale_by_flora(ratio=4)
    state = optimizer.init(grads(0, "a"))
    with pytest.raises(ValueError, match="upgrade_state"):
        optimizer.update(grads(1, "a"), state._replace(projection_id=None))
    with pytest.raises(ValueError, match="the saved state has no mu/b"):
        upgrade_state(state, optimizer.init(grads(0, "ab")))
    with pytest.raises(ValueError, match=r"the saved mu/a is int8\[4, 24\], this optimizer's int8\[2, 24\]"):
        upgrade_state(state, scale_by_flora(ratio=8).init(grads(0, "a")))
