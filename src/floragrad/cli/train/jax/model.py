"""The Llama of transformers, in flax NNX: the same configuration, the same numbers from the same weights."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from floragrad.cli.train.jax.weights import Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Llama(nnx.Module):
    """A causal language model: tokens to logits, as transformers' ``LlamaForCausalLM`` computes them.

    The modules have transformers' names. Matrices are drawn from a normal distribution with the configuration's
    ``initializer_range``; the embedding of the padding token is zero and is not trained, which is the effect of torch's
    ``padding_idx`` does. Embedding and output head are two matrices.

    Args:
        config: A ``LlamaConfig`` with untied embeddings, as many key heads as query heads, and plain rotary
            positions: the models of ``floragrad train``.
        dtype: Of the weights and of the computation; normalisation and softmax are done in float32.
        rngs: Draws the weights.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=11, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1
        ... )
        >>> Llama(config, jnp.float32, nnx.Rngs(0))(jnp.array([[1, 2, 3]])).shape
        (1, 3, 11)

    Sources: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (arXiv 2302.13971), and
    transformers' ``modeling_llama.py`` for details that the paper leaves open.
    """

    def __init__(self, config: Any, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        self.padding = config.pad_token_id
        normal = nnx.initializers.normal(config.initializer_range)
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=normal, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        if self.padding is not None:
            self.embed_tokens.embedding[...] = self.embed_tokens.embedding.at[self.padding].set(0)
        self.layers = nnx.List([_Layer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = _norm(config, dtype, rngs)
        self.lm_head = _linear(config.hidden_size, config.vocab_size, config, dtype, rngs)

    def __call__(self, tokens: jax.Array, checkpointing: bool = False) -> jax.Array:
        """Return logits (batch, length, vocabulary) of tokens (batch, length).

        With ``checkpointing`` the backward pass computes each layer again, instead of keeping its activations.
        """
        run = nnx.remat(_Layer.__call__) if checkpointing else _Layer.__call__
        hidden = self.embed_tokens(tokens)
        if self.padding is not None:
            untrained = (tokens == self.padding)[..., None]
            hidden = jnp.where(untrained, jax.lax.stop_gradient(hidden), hidden)
        for layer in self.layers:
            hidden = run(layer, hidden)
        return self.lm_head(self.norm(hidden))


def abstract_llama(config: Any, dtype: jax.typing.DTypeLike) -> tuple[Any, Params]:
    """Return the model's structure for ``nnx.merge``, and the shapes of its weights: no memory is taken for them."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, dtype, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def next_token_loss(model: Llama, tokens: jax.Array) -> jax.Array:
    """Return the mean cross-entropy, in nats and float32, of each block's (batch, length) tokens but the first."""
    return jnp.mean(next_token_losses(model, tokens))


def next_token_losses(model: Llama, tokens: jax.Array, checkpointing: bool = False) -> jax.Array:
    """Return the mean cross-entropy of each block (batch), as :func:`next_token_loss` averages it."""
    logits = model(tokens, checkpointing)[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen, axis=-1)


class _Layer(nnx.Module):
    def __init__(self, config: Any, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        self.input_layernorm = _norm(config, dtype, rngs)
        self.self_attn = _Attention(config, dtype, rngs)
        self.post_attention_layernorm = _norm(config, dtype, rngs)
        self.mlp = _FeedForward(config, dtype, rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _Attention(nnx.Module):
    def __init__(self, config: Any, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = config.num_attention_heads
        self.theta = config.rope_parameters["rope_theta"]
        size = config.hidden_size
        self.q_proj = _linear(size, size, config, dtype, rngs)
        self.k_proj = _linear(size, size, config, dtype, rngs)
        self.v_proj = _linear(size, size, config, dtype, rngs)
        self.o_proj = _linear(size, size, config, dtype, rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        batch, length, size = hidden.shape
        heads = (batch, length, self.heads, size // self.heads)
        query = rotated(self.q_proj(hidden).reshape(heads), self.theta)
        key = rotated(self.k_proj(hidden).reshape(heads), self.theta)
        mixed = jax.nn.dot_product_attention(query, key, self.v_proj(hidden).reshape(heads), is_causal=True)
        return self.o_proj(mixed.reshape(hidden.shape))


class _FeedForward(nnx.Module):
    def __init__(self, config: Any, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size, config, dtype, rngs)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size, config, dtype, rngs)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, config, dtype, rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def rotated(heads: jax.Array, theta: float) -> jax.Array:
    """Rotary positions: at position t the pair (i, i + d/2) of a head turns by the angle t · theta^(−2i/d).

    Args:
        heads: Queries or keys (batch, length, heads, d).
        theta: The base of the frequencies.

    Example:
        >>> [f"{value:.4f}" for value in rotated(jnp.ones((1, 2, 1, 2)), 10_000.0)[0, 1, 0]]
        ['-0.3012', '1.3818']

    Source: Su et al., "RoFormer" (arXiv 2104.09864), with the halves paired as transformers pairs them.
    """
    length, width = heads.shape[1], heads.shape[3]
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles).astype(heads.dtype), jnp.sin(angles).astype(heads.dtype)
    first, second = jnp.split(heads, 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def _linear(inputs: int, outputs: int, config: Any, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    normal = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=normal, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _norm(config: Any, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs)
