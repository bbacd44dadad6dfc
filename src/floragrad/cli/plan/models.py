"""The model whose step is planned: from a preset, a name, a folder or a file to modules and a batch of inputs."""

import warnings
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
)

from floragrad._checks import DEFAULT_RANK
from floragrad.cli.errors import UserError
from floragrad.cli.hub import find_config, refuse_quantized
from floragrad.cli.plan.presets import MODELS
from floragrad.torch.groups import widest_matrix

Task = Literal["causal language model", "sequence-to-sequence model", "image classifier"]

_BUILDERS: Final[dict[Task, Any]] = {
    "causal language model": AutoModelForCausalLM,
    "sequence-to-sequence model": AutoModelForSeq2SeqLM,
    "image classifier": AutoModelForImageClassification,
}
_MAPPINGS: Final[dict[Task, Any]] = {
    "causal language model": MODEL_FOR_CAUSAL_LM_MAPPING,
    "sequence-to-sequence model": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "image classifier": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}
DEFAULT_IMAGE_SIZE: Final = 224
"""Height and width of images, for models that read any."""
DEFAULT_CHANNELS: Final = 3
_OTHER_INPUTS: Final = ("imagegpt", "shieldgemma2", "siglip2")
"""Image classifiers that read colour clusters, a text beside the image, or patches."""
DEFAULT_SEQUENCE: Final = 1024
"""Tokens of an example where nobody says, and where the model reads so many."""


@dataclass(frozen=True)
class PlannedModel:
    """A model to plan for.

    Attributes:
        name: The user's name for it.
        config: Its configuration, transformers' own.
        task: Its training task.
    """

    name: str
    config: Any
    task: Task

    @property
    def reads_text(self) -> bool:
        """True for sequences of tokens, False for images."""
        return self.task != "image classifier"

    @property
    def built(self) -> type:
        """The class that :meth:`build` makes one of."""
        found = _MAPPINGS[self.task][type(self.config)]
        kinds: tuple[type, ...] = found if isinstance(found, tuple) else (found,)
        return next((kind for kind in kinds if kind.__name__ in self.config.architectures), kinds[0])

    @property
    def positions(self) -> int | None:
        """The longest sequence that it reads; None: any, or it reads images."""
        if not self.reads_text:
            return None
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def sequence(self, asked: int | None) -> int:
        """Tokens of an example: as asked for, else 1024, or all that it reads where that is less.

        Raises:
            UserError: It does not read so many, or it reads images.
        """
        if asked is not None and not self.reads_text:
            raise UserError(
                f"--sequence-length {asked} belongs to models of text, and MODEL {self.name} reads images: leave it out"
            )
        longest = self.positions
        if asked is not None and longest is not None and asked > longest:
            raise UserError(
                f"--sequence-length {asked} is more than the {longest} positions of MODEL {self.name}: "
                f"give at most {longest}"
            )
        return asked or min(longest or DEFAULT_SEQUENCE, DEFAULT_SEQUENCE)

    def rank(self, asked: int | None, sketched: bool) -> int:
        """Return the rank: as asked for, else 128, or a quarter of the widest matrix's smaller side where that is less.

        Args:
            asked: By the user.
            sketched: Whether it is Flora's too.

        Raises:
            UserError: It is above every dimension, or a sketch of that rank would be none.
        """
        largest = self._widest_side // 2 if sketched else self._widest_side
        if asked is not None and asked > largest:
            half = ", and a sketch needs half of it or less" if sketched else ""
            raise UserError(
                f"--rank {asked} is too large for MODEL {self.name}: the largest smaller side of its hidden matrices "
                f"is {self._widest_side}{half}: give at most {largest}"
            )
        return asked or min(DEFAULT_RANK, max(1, self._widest_side // 4))

    @cached_property
    def _widest_side(self) -> int:
        """The largest smaller side that a hidden matrix has."""
        with torch.device("meta"):
            return widest_matrix(self.build(torch.bfloat16))

    def build(self, dtype: torch.dtype) -> Any:
        """Return the model in training mode, on torch's default device.

        Args:
            dtype: Of the weights.

        Raises:
            UserError: It is built on the meta device, and torch cannot run it without memory.
        """
        model = _built(self.config, self.task, self.name, dtype=dtype)
        experts = "grouped_mm" in model.get_experts_implementation().values()
        if experts and dtype != torch.bfloat16 and torch.get_default_device().type == "meta":
            raise UserError(
                f"MODEL {self.name} is a mixture of experts, whose kernel torch knows without memory in bfloat16 "
                "only: give --dtype bfloat16"
            )
        return model.train()

    def inputs(self, batch: int, sequence: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """One micro-batch with its labels, as keyword arguments of the model, on torch's default device.

        Args:
            batch: Examples.
            sequence: Tokens of an example, and of its target; images have the size that the model reads.
            dtype: Of images.
        """
        device = torch.get_default_device()
        if not self.reads_text:
            # Models of images and text, as CLIP, keep what is said of images apart.
            vision = getattr(self.config, "vision_config", self.config)
            size = getattr(vision, "image_size", DEFAULT_IMAGE_SIZE)
            height, width = (size, size) if isinstance(size, int) else size
            channels = getattr(vision, "num_channels", DEFAULT_CHANNELS)
            return {
                "pixel_values": torch.rand(batch, channels, height, width, dtype=dtype, device=device),
                "labels": torch.randint(self.config.num_labels, (batch,), dtype=torch.int64, device=device),
            }
        words = self.config.get_text_config().vocab_size
        tokens = torch.randint(words, (batch, sequence), dtype=torch.int64, device=device)
        return {"input_ids": tokens, "labels": tokens.clone()}


def find_model(model: str) -> PlannedModel:
    """Look a model up: a preset, a configuration file, a folder with one, or a name on a Hugging Face hub.

    Args:
        model: Its name or path. A preset comes before a hub's model of the same name.

    Raises:
        UserError: There is no such model, or it is none that can be planned for.

    Example:
        >>> find_model("gpt2-xl").positions
        1024
    """
    preset = MODELS.get(model)
    if preset is not None:
        return planned_model(AutoConfig.for_model(preset.model_type, **preset.numbers), model)
    allowed = "give a preset (floragrad plan --help lists them), a configuration file, a folder with a config.json"
    return planned_model(find_config("MODEL", model, allowed), model)


def planned_model(config: Any, name: str) -> PlannedModel:
    """Return the model of a configuration.

    Args:
        config: A configuration of transformers.
        name: Its name.

    Raises:
        UserError: It is no model that is trained on tokens, or on images with labels, or cannot be built here.
    """
    refuse_quantized(f"MODEL {name}", config)
    task = _task(config)
    if task is None:
        raise UserError(
            f"MODEL {name} is a {config.model_type}, which is none of what can be planned for: {', '.join(_BUILDERS)}"
        )
    if task == "image classifier" and config.model_type in _OTHER_INPUTS:
        raise UserError(f"MODEL {name} is a {config.model_type}, which does not read images alone: choose another")
    config = deepcopy(config)
    # transformers looks through it where a configuration has several classes, and fails on None.
    config.architectures = config.architectures or []
    # What generation keeps of every layer, no training step needs.
    config.use_cache = False
    return PlannedModel(name, config, task)


def recompute_activations(model: nn.Module) -> None:
    """Let a model of transformers recompute the activations of its blocks in the backward pass."""
    with warnings.catch_warnings():
        # Newer versions of transformers have another name for it, older ones only this.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]


def _task(config: Any) -> Task | None:
    if getattr(config, "is_encoder_decoder", False):
        tasks: tuple[Task, ...] = ("sequence-to-sequence model",)
    else:
        tasks = ("causal language model", "image classifier")
    return next((task for task in tasks if type(config) in _MAPPINGS[task]), None)


def _built(config: Any, task: Task, name: str, **options: Any) -> Any:
    """Return a model of a configuration, on torch's default device.

    Raises:
        UserError: It needs a package that is not installed.
    """
    try:
        return _BUILDERS[task].from_config(config, **options)
    except ImportError as error:
        raise UserError(f"MODEL {name} cannot be built: {' '.join(str(error).split())}") from error
