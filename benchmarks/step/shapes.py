"""The tensors that are stepped: those of models that are built on the meta device, so that nothing is allocated."""

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Final, get_args

import torch
from torch import nn
from transformers import AutoConfig

from floragrad import param_groups
from floragrad.cli.plan.models import find_model, planned_model
from floragrad.policy import Kind

LAYERS: Final = "gpt2-layers"
"""GPT-2 small without its embeddings: what the goals are about."""
MODELS: Final = ("gpt2", "llama-60m", "llama-350m", "t5-small")
WIDTHS: Final = (256, 512, 768, 1024)
"""Of GPT-2's layers, for the growth over model size; 768 is GPT-2 small."""
NAMES: Final = (LAYERS, *MODELS)
HEAD_WIDTH: Final = 64


@dataclass(frozen=True)
class Spec:
    """One tensor.

    Attributes:
        name: In its model.
        shape: Of it.
        kind: What it is, as :func:`floragrad.param_groups` sorts it.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)


def layers_of_width(width: int) -> str:
    """The name of GPT-2 small's layers with another width.

    Example:
        >>> layers_of_width(512), layers_of_width(768)
        ('gpt2-layers-512', 'gpt2-layers')
    """
    return LAYERS if width == 768 else f"{LAYERS}-{width}"


@cache
def specs(name: str) -> tuple[Spec, ...]:
    """The tensors of a set of shapes, tied ones once.

    Args:
        name: One of :data:`NAMES`, or of :func:`layers_of_width`.
    """
    if not name.startswith(LAYERS):
        return _sorted_specs(_built(name))
    model = _built("gpt2") if name == LAYERS else _gpt2(int(name.removeprefix(f"{LAYERS}-")))
    return tuple(spec for spec in _sorted_specs(model) if spec.name.startswith("transformer.h."))


def parameters(name: str) -> int:
    """How many numbers a set of shapes has."""
    return sum(spec.numel for spec in specs(name))


def largest(name: str) -> int:
    """How many numbers its largest tensor has."""
    return max(spec.numel for spec in specs(name))


def _built(name: str) -> nn.Module:
    model = find_model(name)
    with torch.device("meta"):
        built = model.build(torch.float32, model.blocks)
    assert isinstance(built, nn.Module)
    return built


def _gpt2(width: int) -> nn.Module:
    config = AutoConfig.for_model("gpt2", n_embd=width, n_head=width // HEAD_WIDTH)
    model = planned_model(config, layers_of_width(width))
    with torch.device("meta"):
        built = model.build(torch.float32, model.blocks)
    assert isinstance(built, nn.Module)
    return built


def _sorted_specs(model: nn.Module) -> tuple[Spec, ...]:
    found = []
    for group in param_groups(model, lr=1.0):
        kind = group["kind"]
        assert kind in get_args(Kind)
        found += [Spec(name, tuple(param.shape), kind) for name, param in group["params"]]
    return tuple(found)
