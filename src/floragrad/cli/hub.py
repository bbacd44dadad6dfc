"""Configurations of the Hugging Face hub, and models that neither training nor planning takes."""

from typing import Any

from floragrad.cli.errors import UserError


def find_config(name: str, model: str, allowed: str) -> Any:
    """Read the configuration of a model, without executing code of its own.

    Args:
        name: The option that named the model, in messages.
        model: A configuration file, a folder with one, or a name on the hub.
        allowed: The files, folders and presets that are allowed, in words.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        refuse_remote_code(f"{name} {model}", error)
        raise UserError(
            f"{name} {model} is unknown: {allowed}, or the name of a model on a Hugging Face hub that can be reached"
        ) from error


def refuse_remote_code(name: str, error: Exception) -> None:
    """Refuse a model that transformers would have to execute code of the model's own for, if that is the error."""
    if "trust_remote_code" in str(error):
        raise UserError(
            f"{name} brings code of its own (auto_map), which is not executed here: give a model that transformers "
            "itself has"
        ) from error


def refuse_quantized(name: str, config: Any) -> None:
    """Refuse a configuration whose weights are stored in a low-bit format, which no step trains."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise UserError(
            f"{name} is quantized ({getattr(method, 'value', method)}), and quantized weights are not trained: give "
            "the model that it was made from, or remove quantization_config from its config.json"
        )
