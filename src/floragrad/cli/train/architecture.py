"""The Llamas of ``--model``, in transformers' terms: the configuration that both backends build."""

from typing import Any

from transformers import LlamaConfig

from floragrad.cli.presets import PRESETS
from floragrad.cli.train.config import RunConfig


def llama_config(config: RunConfig, vocab_size: int) -> Any:
    """Return the configuration of the run's preset. Its embeddings are not tied."""
    preset = PRESETS[config.model]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=config.dtype,
        vocab_size=vocab_size,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_attention_heads=preset.heads,
        num_hidden_layers=preset.layers,
        max_position_embeddings=config.sequence_length,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
