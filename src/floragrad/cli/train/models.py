"""The model: a Llama by size, or a model of Hugging Face by name or folder."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from floragrad.cli.errors import UserError
from floragrad.cli.hub import find_config, refuse_quantized, refuse_remote_code
from floragrad.cli.presets import PRESETS
from floragrad.cli.train.architecture import llama_config
from floragrad.cli.train.config import RunConfig
from floragrad.torch import groups

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
CAUSAL, ENCODER_DECODER = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
_KINDS = {CAUSAL: "causal language model", ENCODER_DECODER: "encoder-decoder with a language model's head"}


def model_config(config: RunConfig, vocab_size: int) -> Any:
    """Return the architecture of the run's model, in transformers' terms; refuse one with too few positions."""
    if config.model in PRESETS:
        return llama_config(config, vocab_size)
    allowed = f"choose one of {', '.join(PRESETS)}, a folder with a model's config.json"
    found = find_config("--model", config.model, allowed)
    refuse_quantized(f"--model {config.model}", found)
    positions, target = getattr(found, "max_position_embeddings", None), config.target_length or 0
    source = config.sequence_length
    if positions is not None and positions < (max(source, target) if found.is_encoder_decoder else source + target):
        lengths = f"--sequence-length {source}" + (f" with --target-length {target}" if target else "")
        raise UserError(f"{lengths} is more than the {positions} positions of {config.model}: give at most {positions}")
    return found


def build_model(auto_class: str, config: RunConfig, vocab_size: int) -> Any:
    """Return the model to train, with its weights where it has some, else newly drawn from the global generator."""
    found = model_config(config, vocab_size)
    folder = Path(config.model)
    bare = folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in WEIGHTS)
    if config.model in PRESETS or bare:
        return _from_config(auto_class, found, config)
    chosen = _class_for(auto_class, found)
    try:
        return getattr(transformers, chosen).from_pretrained(
            config.model, dtype=DTYPES[config.dtype], trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        refuse_remote_code(f"--model {config.model}", error)
        reason = " ".join(str(error).split())
        raise UserError(
            f"--model {config.model} cannot be loaded as a {_KINDS[chosen]} ({reason}): give another"
        ) from error


def _class_for(auto_class: str, architecture: Any) -> str:
    """Return a class, or the one of causal language models in place of encoder-decoders where it is none."""
    is_causal = auto_class == ENCODER_DECODER and not architecture.is_encoder_decoder
    return CAUSAL if is_causal else auto_class


def new_model(auto_class: str, architecture: Any, config: RunConfig) -> Any:
    """Return a model of an architecture in transformers' terms, drawn from the global generator."""
    auto = getattr(transformers, _class_for(auto_class, architecture))
    return auto.from_config(architecture, dtype=DTYPES[config.dtype], trust_remote_code=False)


def rebuild_model(auto_class: str, config: RunConfig, checkpoint: Path) -> Any:
    """Return a model of the checkpoint's architecture, whose weights the Trainer will load."""
    return new_model(auto_class, AutoConfig.from_pretrained(checkpoint, trust_remote_code=False), config)


def trained_model(auto_class: str, config: RunConfig, checkpoint: Path) -> Any:
    """Return the checkpoint's model with its weights."""
    architecture = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    auto = getattr(transformers, _class_for(auto_class, architecture))
    return auto.from_pretrained(checkpoint, dtype=DTYPES[config.dtype], trust_remote_code=False)


def embedding_rows(config: RunConfig) -> int:
    """Return the vocabulary size of a model of Hugging Face."""
    return int(model_config(config, 0).get_text_config().vocab_size)


def widest_matrix(auto_class: str, config: RunConfig) -> int:
    """Return the largest smaller side of the hidden matrices of a model of Hugging Face."""
    with torch.device("meta"):
        model = _from_config(auto_class, model_config(config, 0), config)
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


def _from_config(auto_class: str, found: Any, config: RunConfig) -> Any:
    try:
        return new_model(auto_class, found, config)
    except ValueError as error:
        refuse_remote_code(f"--model {config.model}", error)
        raise UserError(
            f"--model {config.model} is a {found.model_type}, and that is no {_KINDS[_class_for(auto_class, found)]}: "
            "give one that is"
        ) from error
