"""The model: a Llama by size, or any causal language model of Hugging Face by name or folder."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from floragrad.train.config import RunConfig
from floragrad.train.errors import UserError
from floragrad.train.presets import PRESETS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def model_config(config: RunConfig, vocab_size: int) -> Any:
    """The architecture of the run's model, in transformers' terms. The Llamas' embeddings are not tied.

    Raises:
        UserError: There is no such model, or it cannot read blocks of the run's length.
    """
    preset = PRESETS.get(config.model)
    if preset is not None:
        return LlamaConfig(
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
    try:
        found = AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--model {config.model} is unknown: choose one of {', '.join(PRESETS)}, a folder with a model's "
            "config.json, or the name of a model on a Hugging Face hub that can be reached"
        ) from error
    positions = getattr(found, "max_position_embeddings", None)
    if positions is not None and positions < config.sequence_length:
        raise UserError(
            f"--sequence-length {config.sequence_length} is more than the {positions} positions of "
            f"{config.model}: give at most {positions}"
        )
    return found


def build_model(config: RunConfig, vocab_size: int) -> Any:
    """The model to train, with its weights where it has some, else newly drawn from the global generator."""
    found = model_config(config, vocab_size)
    folder = Path(config.model)
    bare = folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in WEIGHTS)
    if config.model in PRESETS or bare:
        return _from_config(found, config)
    try:
        return AutoModelForCausalLM.from_pretrained(config.model, dtype=DTYPES[config.dtype])
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--model {config.model} cannot be loaded as a causal language model ({reason}): give another"
        ) from error


def rebuild_model(config: RunConfig, checkpoint: Path) -> Any:
    """A model of the checkpoint's architecture, whose weights the Trainer will load."""
    return _from_config(AutoConfig.from_pretrained(checkpoint), config)


def empty_model(config: RunConfig, vocab_size: int) -> Any:
    """The model without memory for its weights, to look at its shapes."""
    with torch.device("meta"):
        return _from_config(model_config(config, vocab_size), config)


def _from_config(found: Any, config: RunConfig) -> Any:
    try:
        return AutoModelForCausalLM.from_config(found, dtype=DTYPES[config.dtype])
    except ValueError as error:
        raise UserError(
            f"--model {config.model} is a {found.model_type}, and that is no causal language model: give one that is"
        ) from error
