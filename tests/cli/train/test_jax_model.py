"""The Llama of the JAX backend next to transformers' own."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM

from floragrad.cli.train.jax.model import Llama, next_token_losses
from floragrad.cli.train.jax.weights import from_transformers, parameter_names, to_transformers

PADDING = 0
# Weights ten times larger than the default, so that attention and gates are far from linear.
CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=80,
    num_attention_heads=4,
    num_hidden_layers=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=PADDING,
    eos_token_id=PADDING,
    pad_token_id=PADDING,
)
Answers = Mapping[str, np.ndarray]


@cache
def drawn(dtype: Any = jnp.float32) -> tuple[Any, dict[str, Any]]:
    graph, state = nnx.split(Llama(CONFIG, dtype, nnx.Rngs(0)))
    return graph, nnx.to_pure_dict(state)


def blocks() -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 64))
    tokens[:, ::7] = PADDING
    return tokens


def torch_answers(model: LlamaForCausalLM) -> Answers:
    """Logits, loss, and the loss's gradient by weight."""
    model.zero_grad()
    tokens = torch.from_numpy(blocks())
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    gradients = {name: weight.grad.numpy().copy() for name, weight in model.named_parameters()}
    return {"logits": out.logits.detach().numpy(), "loss": out.loss.detach().numpy(), **gradients}


def differentiated(graph: Any, checkpointing: bool = False) -> Any:
    """The loss and its gradient as a function of the weights."""
    tokens = jnp.asarray(blocks())

    def loss_of(params: Any) -> jax.Array:
        return jnp.mean(next_token_losses(nnx.merge(graph, params), tokens, checkpointing))

    return jax.value_and_grad(loss_of)


def jax_answers(weights: Mapping[str, np.ndarray]) -> Answers:
    graph, like = drawn()
    params = from_transformers(weights, like)
    tokens = jnp.asarray(blocks())
    loss, gradients = jax.jit(differentiated(graph))(params)
    logits = jax.jit(lambda params: nnx.merge(graph, params)(tokens))(params)
    return {"logits": np.asarray(logits), "loss": np.asarray(loss), **to_transformers(gradients)}


@pytest.fixture(scope="module")
def answers() -> tuple[Answers, Answers, Answers]:
    """JAX in float32, torch in float32, torch in float64: from the same weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    ours = jax_answers({name: weight.numpy() for name, weight in model.state_dict().items()})
    return ours, torch_answers(model), torch_answers(model.double())


def test_logits_loss_and_gradients_are_those_of_transformers(answers: tuple[Answers, Answers, Answers]) -> None:
    """Ours may be as far from float64 as torch's own float32 is, and half as far again."""
    ours, single, double = answers
    assert ours.keys() == double.keys()
    for name, exact in double.items():
        size = np.linalg.norm(exact)
        error, allowed = np.linalg.norm(ours[name] - exact) / size, np.linalg.norm(single[name] - exact) / size
        # A float32 number by itself, such as the loss, is a unit in its last place off or not at all.
        assert error <= max(1.5 * allowed, np.finfo(np.float32).eps), name


def test_checkpointing_computes_the_layers_again_and_changes_nothing() -> None:
    graph, params = drawn()
    plain, checkpointed = differentiated(graph), differentiated(graph, checkpointing=True)
    forward = lambda params: nnx.merge(graph, params)(jnp.asarray(blocks()))  # noqa: E731
    kept, again, once = (jax.jit(f).lower(params).cost_analysis()["flops"] for f in (plain, checkpointed, forward))
    assert once / 2 < again - kept < once, "all that the layers do, but not the head"
    for leaf, wanted in zip(*(jax.tree.leaves(jax.jit(f)(params)) for f in (checkpointed, plain)), strict=True):
        # The order of the sums within a product is the compiler's.
        assert np.linalg.norm(leaf - wanted) <= 32 * np.finfo(np.float32).eps * np.linalg.norm(wanted)


def test_the_padding_token_is_not_trained(answers: tuple[Answers, Answers, Answers]) -> None:
    for each in answers:
        gradient = each["model.embed_tokens.weight"]
        assert not gradient[PADDING].any()
        assert gradient[blocks()[0, 1]].any()


def test_every_weight_has_its_name_and_shape_in_transformers() -> None:
    _, params = drawn()
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in LlamaForCausalLM(CONFIG).state_dict().items()}
    assert {name: weight.shape for name, weight in to_transformers(params).items()} == expected
    assert set(jax.tree.leaves(parameter_names(params))) == expected.keys()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_weights_come_back_from_transformers_layout_unchanged(dtype: Any) -> None:
    _, params = drawn(dtype=dtype)
    back = from_transformers(to_transformers(params), params)
    for leaf, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert leaf.dtype == wanted.dtype == dtype
        assert jnp.array_equal(leaf, wanted)


def test_weights_are_drawn_as_transformers_draws_them() -> None:
    """Mean and standard deviation of n normal numbers lie within 5 standard errors, σ/√n and σ/√2n."""
    _, params = drawn()
    torch.manual_seed(0)
    expected = LlamaForCausalLM(CONFIG).state_dict()
    for name, weight in to_transformers(params).items():
        for drawn_weight in (weight, expected[name].numpy()):
            if "norm" in name:
                assert (drawn_weight == 1).all(), name
                continue
            if name == "model.embed_tokens.weight":
                assert not drawn_weight[PADDING].any()
                drawn_weight = np.delete(drawn_weight, PADDING, axis=0)
            sigma, error = CONFIG.initializer_range, CONFIG.initializer_range / np.sqrt(drawn_weight.size)
            assert abs(drawn_weight.mean()) < 5 * error, name
            assert abs(drawn_weight.std() - sigma) < 5 * error / np.sqrt(2), name
