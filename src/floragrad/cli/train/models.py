"""The model: a Llama by size, or any causal language model of Hugging Face by name or folder."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from floragrad.cli.errors import UserError
from floragrad.cli.hub import find_config, refuse_quantized, refuse_remote_code
from floragrad.cli.presets import PRESETS
from floragrad.cli.train.architecture import llama_config
from floragrad.cli.train.config import RunConfig
from floragrad.torch import groups

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def model_config(config: RunConfig, vocab_size: int) -> Any:
    """Return the architecture of the run's model, in transformers' terms.

    Raises:
        UserError: There is no such model, or it cannot read blocks of the run's length.
    """
    if config.model in PRESETS:
        return llama_config(config, vocab_size)
    allowed = f"choose one of {', '.join(PRESETS)}, a folder with a model's config.json"
    found = find_config("--model", config.model, allowed)
    refuse_quantized(f"--model {config.model}", found)
    positions = getattr(found, "max_position_embeddings", None)
    if positions is not None and positions < config.sequence_length:
        raise UserError(
            f"--sequence-length {config.sequence_length} is more than the {positions} positions of "
            f"{config.model}: give at most {positions}"
        )
    return found


def build_model(config: RunConfig, vocab_size: int) -> Any:
    """Return the model to train, with its weights where it has some, else newly drawn from the global generator."""
    found = model_config(config, vocab_size)
    folder = Path(config.model)
    bare = folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in WEIGHTS)
    if config.model in PRESETS or bare:
        return _from_config(found, config)
    try:
        return AutoModelForCausalLM.from_pretrained(config.model, dtype=DTYPES[config.dtype], trust_remote_code=False)
    except (OSError, ValueError) as error:
        refuse_remote_code(f"--model {config.model}", error)
        reason = " ".join(str(error).split())
        raise UserError(
            f"--model {config.model} cannot be loaded as a causal language model ({reason}): give another"
        ) from error


def new_model(auto_class: str, architecture: Any, config: RunConfig) -> Any:
    """Return a model of an architecture, drawn from the global generator.

    Args:
        auto_class: Name of transformers' class for such models.
        architecture: In transformers' terms.
        config: Of the run.
    """
    auto = getattr(transformers, auto_class)
    return auto.from_config(architecture, dtype=DTYPES[config.dtype], trust_remote_code=False)


def rebuild_model(auto_class: str, config: RunConfig, checkpoint: Path) -> Any:
    """Return a model of the checkpoint's architecture, whose weights the Trainer will load."""
    return new_model(auto_class, AutoConfig.from_pretrained(checkpoint, trust_remote_code=False), config)


def trained_model(auto_class: str, config: RunConfig, checkpoint: Path) -> Any:
    """Return the checkpoint's model with its weights."""
    auto = getattr(transformers, auto_class)
    return auto.from_pretrained(checkpoint, dtype=DTYPES[config.dtype], trust_remote_code=False)


def embedding_rows(config: RunConfig) -> int:
    """Return the vocabulary size of a model of Hugging Face."""
    return int(model_config(config, 0).get_text_config().vocab_size)


def widest_matrix(config: RunConfig) -> int:
    """Return the largest smaller side of the hidden matrices of a model of Hugging Face.

    Raises:
        UserError: There is no such model, it is no causal language model, or it keeps its activations in any case.
    """
    with torch.device("meta"):
        model = _from_config(model_config(config, 0), config)
    if config.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"--gradient-checkpointing is not supported by --model {config.model}, a {type(model).__name__}: leave it "
            "out"
        )
    return groups.widest_matrix(model)


def enable_checkpointing(model: Any) -> None:
    """Let a model of transformers compute its layers' activations again in the backward pass."""
    # The older name of it is deprecated, and versions before the newer one are supported.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _from_config(found: Any, config: RunConfig) -> Any:
    try:
        return new_model("AutoModelForCausalLM", found, config)
    except ValueError as error:
        refuse_remote_code(f"--model {config.model}", error)
        raise UserError(
            f"--model {config.model} is a {found.model_type}, and that is no causal language model: give one that is"
        ) from error
