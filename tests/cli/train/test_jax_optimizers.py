"""The optimizers of the JAX backend next to those of the PyTorch one, schedule and clipping included."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_scheduler

from floragrad import param_groups
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.jax.optimizers import GRADIENT_NORM, kinds, learning_rates, transformation, windowed
from floragrad.cli.train.optimizers import optimizer_class

STEPS, WARMUP = 10, 2
EPS = float(np.finfo(np.float32).eps)


class Toy(torch.nn.Module):
    """One parameter of each kind, under the names of the Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(30, 8)
        self.layer = torch.nn.Linear(8, 6, bias=False)
        self.norm = torch.nn.RMSNorm(8)


def config(**options: Any) -> RunConfig:
    return RunConfig.resolve(
        **{"steps": STEPS, "warmup_steps": WARMUP, "lr": 1e-2, "embedding_lr": 3e-2, "weight_decay": 0.1, **options}
    )


def tree(embedding: Any, kernel: Any, scale: Any) -> dict[str, Any]:
    return {"embed_tokens": {"embedding": embedding}, "layer": {"kernel": kernel}, "norm": {"scale": scale}}


def as_jax(model: Toy, of: str = "data") -> dict[str, Any]:
    # A copy of its own: JAX reads it later, when torch may have clipped in place.
    weights = [getattr(each.weight, of).numpy().copy() for each in (model.embed_tokens, model.layer, model.norm)]
    return jax.tree.map(jnp.array, tree(weights[0], weights[1].T, weights[2]))


def test_parameters_are_sorted_as_param_groups_sorts_them() -> None:
    groups = {group["kind"]: [name for name, _ in group["params"]] for group in param_groups(Toy(), lr=1.0)}
    assert groups == {"vocabulary": ["embed_tokens.weight"], "matrix": ["layer.weight"], "vector": ["norm.weight"]}
    assert kinds(as_jax(Toy())) == tree("vocabulary", "matrix", "vector")
    assert kinds({"lm_head": {"kernel": jnp.zeros((8, 30))}}) == {"lm_head": {"kernel": "vocabulary"}}


@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
@pytest.mark.parametrize(
    ("name", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
def test_the_schedule_is_the_trainers(warmup: int, name: str, theirs: str) -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1e-2)
    schedule = get_scheduler(theirs, optimizer, warmup, STEPS)
    rate = learning_rates(config(warmup_steps=warmup, schedule=name))["matrix"]
    for step in range(STEPS):
        # In float32 here: the angle, its cosine, 1 + cos, the half and the product round once each.
        assert float(rate(step)) == pytest.approx(schedule.get_last_lr()[0], abs=5 * EPS * 1e-2)
        optimizer.step()
        schedule.step()


# How far a step's move is off in float32, as a share of it: some twenty roundings; and where a bias is corrected by
# 1 − 0.999ᵗ, half a unit in the last place of 0.999 beside 0.001.
MOVE_ERROR = {"adamw": EPS / 2 / 0.001, "adafactor": 20 * EPS}


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("optimizer", MOVE_ERROR)
def test_ten_steps_are_those_of_torch(optimizer: str, max_grad_norm: float) -> None:
    """A step rounds the weight once, and moves it by about the learning rate."""
    torch.manual_seed(0)
    model, options = Toy(), config(optimizer=optimizer, max_grad_norm=max_grad_norm)
    kind, arguments = optimizer_class(options, model)
    theirs = kind(**arguments)
    schedule = get_cosine_schedule_with_warmup(theirs, WARMUP, STEPS)
    ours = transformation(options)
    params = as_jax(model)
    state, update = ours.init(params), jax.jit(ours.update)
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        gradients = as_jax(model, "grad")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
        theirs.step()
        schedule.step()
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        assert float(optax.tree.get(state, GRADIENT_NORM)) == pytest.approx(float(norm), rel=1e-6)
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(as_jax(model)), strict=True):
        np.testing.assert_allclose(
            leaf, wanted, rtol=STEPS * EPS, atol=STEPS * options.embedding_lr * MOVE_ERROR[optimizer]
        )
    assert update._cache_size() == 1


def bfloat16(model: Toy) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), as_jax(model))


@pytest.mark.parametrize("optimizer", ["flora", "adamw", "adafactor"])
@pytest.mark.parametrize("accumulator", ["none", "exact", "flora"])
def test_a_step_in_bfloat16_changes_no_dtype(optimizer: str, accumulator: str) -> None:
    several = {} if accumulator == "none" else {"accumulator": accumulator, "accumulate": 2}
    flora = {"rank": 2} if optimizer == "flora" else {}
    options = config(optimizer=optimizer, **several, **flora)
    ours, params = windowed(options, transformation(options)), bfloat16(Toy())
    state = jax.eval_shape(ours.init, params)
    updates, after = jax.eval_shape(ours.update, params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.leaves(after) == jax.tree.leaves(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def test_the_norm_of_bfloat16_gradients_is_taken_in_float32() -> None:
    options, params = config(optimizer="adamw"), bfloat16(Toy())
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3.0), params)
    ours = transformation(options)
    _, state = jax.jit(ours.update)(gradients, ours.init(params), params)
    exact = 3.0 * np.sqrt(sum(leaf.size for leaf in jax.tree.leaves(params)))
    assert float(optax.tree.get(state, GRADIENT_NORM)) == pytest.approx(exact, rel=2 * EPS)
