"""Adapters of ``--optimizer lora``: two thin matrices beside each hidden matrix, which stays as it is."""

import warnings
from typing import Final

from torch import nn

from floragrad._extras import require

_BASE, _ADAPTER = ".base_layer.weight", ".lora_"
ALL_LAYERS: Final = "all-linear"


def add_adapters(model: nn.Module, rank: int, *, others: bool) -> None:
    """Add LoRA's adapters to all linear layers but the head, in place.

    Args:
        model: One of transformers'. The layers' matrices are frozen.
        rank: Of the adapters.
        others: Whether everything but those matrices is trained too.
    """
    peft = require("peft", "plan")
    trained = [param for param in model.parameters() if param.requires_grad]
    with warnings.catch_warnings():
        # It tells that a layer of GPT-2 stores its matrix transposed, and takes care of it itself.
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=ALL_LAYERS), model)
    frozen = {param for name, param in model.named_parameters() if name.endswith(_BASE)}
    for param in trained:
        param.requires_grad_(others and param not in frozen)


def adapted_elements(model: nn.Module) -> int:
    """Return the number of elements of the matrices that have adapters."""
    return sum(param.numel() for name, param in model.named_parameters() if name.endswith(_BASE))


def adapter_bytes(model: nn.Module) -> int:
    """Return the bytes of the adapters themselves."""
    return sum(param.nbytes for name, param in model.named_parameters() if _ADAPTER in name)
