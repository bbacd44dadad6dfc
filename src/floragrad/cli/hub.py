"""Models of the Hugging Face hub that neither training nor planning takes."""

from typing import Any

from floragrad.cli.errors import UserError


def refuse_remote_code(name: str, error: Exception) -> None:
    """Explain an error where transformers would have to execute code of the model's own.

    Raises:
        UserError: That is the error.
    """
    if "trust_remote_code" in str(error):
        raise UserError(
            f"{name} brings code of its own (auto_map), which is not executed here: give a model that transformers "
            "itself has"
        ) from error


def refuse_quantized(name: str, config: Any) -> None:
    """Refuse a configuration whose weights are stored in a low-bit format, which no step trains.

    Raises:
        UserError: It is one.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise UserError(
            f"{name} is quantized ({getattr(method, 'value', method)}), and quantized weights are not trained: give "
            "the model that it was made from, or remove quantization_config from its config.json"
        )
