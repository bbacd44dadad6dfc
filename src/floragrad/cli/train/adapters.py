"""Adapters of ``--optimizer lora``: two thin matrices beside each hidden matrix, which stays as it is."""

from torch import nn

from floragrad.cli.peers import with_adapters

_BASE, _ADAPTER = ".base_layer.weight", ".lora_"


def add_adapters(model: nn.Module, rank: int, *, others: bool) -> None:
    """Add LoRA's adapters to all linear layers but the head of one of transformers' models, in place.

    The layers' matrices are frozen; everything else is trained too if ``others``.
    """
    trained = [param for param in model.parameters() if param.requires_grad]
    with_adapters(model, rank, in_place=True)
    frozen = adapted_parameters(model)
    for param in trained:
        param.requires_grad_(others and param not in frozen)


def adapted_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the matrices that have adapters."""
    return {param for name, param in model.named_parameters() if name.endswith(_BASE)}


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the matrices of the adapters."""
    return {param for name, param in model.named_parameters() if _ADAPTER in name}
