"""The task ``vision``: a small ViT that classifies images."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from floragrad.cli.disk import write_text
from floragrad.cli.presets import TASKS
from floragrad.cli.train import manifest
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.order import Order, sampled
from floragrad.cli.train.tasks.images import SIZE, Labelled, read_images
from floragrad.cli.train.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor

PATCH: Final = 7
"""Rows and columns of a patch."""
_PARTS: Final = ("train", "validation")
_PROCESSOR: Final = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}
"""What :class:`ImageBlocks` does to pixels, in transformers' terms."""


@dataclass(frozen=True)
class ImageFacts:
    """Facts of prepared images, for the summary and for readers of the folder.

    Attributes:
        source: Where the images come from.
        train_images: Images to train on.
        held_out_images: Images held out.
        classes: How many classes there are.
        sha256: Of all pixels and classes.
    """

    source: str
    train_images: int
    held_out_images: int
    classes: int
    sha256: str


class ImageBlocks:
    """Images and their classes, in an order; pixels between -1 and 1."""

    def __init__(self, images: Labelled, order: Order) -> None:
        self._images, self._order = images, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> dict[str, NDArray[Any]]:
        index = self._order[position]
        pixels = self._images.pixels[index].astype(np.float32)[None]
        return {"pixel_values": pixels / 127.5 - 1, "labels": np.asarray(self._images.labels[index])}


class ImageProcessor:
    """Settings of transformers' processor that prepares images for the model."""

    def save_pretrained(self, folder: Path) -> None:
        """Write them into a folder."""
        write_text(folder / "preprocessor_config.json", json.dumps(_PROCESSOR, indent=2) + "\n")


@dataclass(frozen=True)
class ImageData:
    """Prepared images: their folder, and their facts."""

    folder: Path
    facts: ImageFacts

    @property
    def processor(self) -> ImageProcessor:
        """What prepares images for the model."""
        return ImageProcessor()

    def train_blocks(self, config: RunConfig) -> ImageBlocks:
        """Return the images that the run trains on, in order, to its end."""
        order = Order(self.facts.train_images, config.seed, config.steps * config.units_per_step)
        return ImageBlocks(self._read("train"), order)

    def validation_blocks(self, config: RunConfig) -> ImageBlocks:
        """Return a sample of the held-out images."""
        chosen, found = sampled(self.facts.held_out_images, config.eval_blocks), self._read("validation")
        return ImageBlocks(Labelled(found.pixels[chosen], found.labels[chosen]), Order(len(chosen)))

    def held_out_blocks(self, _config: RunConfig) -> int:
        """Count the held-out images."""
        return self.facts.held_out_images

    def describe(self) -> str:
        """Return the source and the number of the images."""
        facts = self.facts
        return (
            f"{facts.source}: {facts.train_images:,} images of {facts.classes} classes to train on, "
            f"{facts.held_out_images:,} held out"
        )

    def _read(self, part: str) -> Labelled:
        pixels, labels = (np.load(self.folder / f"{part}_{name}.npy", mmap_mode="r") for name in Labelled._fields)
        return Labelled(pixels, labels)


class Vision(Task):
    """A ViT, newly drawn, on gray images."""

    auto_class = "AutoModelForImageClassification"
    blocks, everything = "held-out images", "all of them"

    def prepare(self, config: RunConfig, folder: Path) -> ImageData:
        """Read the images of a run and write them to a new folder."""
        images, digest = read_images(config), hashlib.sha256()
        folder.mkdir()
        for part, labelled in zip(_PARTS, (images.train, images.held_out), strict=True):
            for name, values in labelled._asdict().items():
                np.save(folder / f"{part}_{name}.npy", values)
                digest.update(values.tobytes())
        facts = ImageFacts(
            source=images.source,
            train_images=len(images.train.labels),
            held_out_images=len(images.held_out.labels),
            classes=int(max(images.train.labels.max(), images.held_out.labels.max())) + 1,
            sha256=digest.hexdigest(),
        )
        manifest.write_facts(folder, asdict(facts))
        return ImageData(folder, facts)

    def load(self, folder: Path) -> ImageData:
        """Open prepared images."""
        return ImageData(folder, ImageFacts(**manifest.read_facts(folder)))

    def build(self, config: RunConfig, data: ImageData) -> Any:
        """Return a new ViT."""
        from transformers import ViTConfig

        from floragrad.cli.train.models import new_model

        preset = TASKS["vision"][config.model]
        architecture = ViTConfig(
            image_size=SIZE,
            patch_size=PATCH,
            num_channels=1,
            num_labels=data.facts.classes,
            hidden_size=preset.hidden_size,
            intermediate_size=preset.intermediate_size,
            num_attention_heads=preset.heads,
            num_hidden_layers=preset.layers,
        )
        return new_model(self.auto_class, architecture, config)

    def examine(self, model: Any, batch: Mapping[str, Any]) -> "dict[str, Tensor]":
        """Return each image's cross-entropy, in nats and float32, and 1 where the class is right."""
        from torch.nn.functional import cross_entropy

        logits, labels = model(pixel_values=batch["pixel_values"]).logits.float(), batch["labels"]
        right = (logits.argmax(1) == labels).float()
        return {"loss": cross_entropy(logits, labels, reduction="none"), "accuracy": right}
