"""The task ``vision``: a small ViT that classifies Fashion-MNIST or the images of a dataset, small, gray and square."""

import gzip
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from floragrad.cli.disk import write_text
from floragrad.cli.errors import UserError
from floragrad.cli.presets import TASKS
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.data import HELD_OUT, Data, Example, divide
from floragrad.cli.train.sources import MEGABYTE, dataset_name, dataset_rows
from floragrad.cli.train.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor

SIZE: Final = 28
"""Rows and columns of an image."""
FASHION_MNIST: Final = Path("/usr/share/datasets/fashion-mnist")
PACKAGE: Final = "apt-get install dataset-fashion-mnist"
_UNSIGNED_BYTES: Final = 0x08
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
"""What :meth:`Labelled.read` does to pixels, in transformers' terms."""


class Labelled(NamedTuple):
    """Images, uint8 (n, SIZE, SIZE), and their classes, int64 (n,)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def read(self, index: int) -> Example:
        """Return an image, its pixels between -1 and 1, and its class."""
        pixels = self.pixels[index].astype(np.float32)[None]
        return {"pixel_values": pixels / 127.5 - 1, "labels": np.asarray(self.labels[index])}


@dataclass(frozen=True)
class ImageFacts:
    """Facts of prepared images, for the summary and for readers of the folder; ``sha256`` of all pixels and classes."""

    source: str
    train_images: int
    held_out_images: int
    classes: int
    sha256: str


class ImageProcessor:
    """Settings of transformers' processor that prepares images for the model."""

    def save_pretrained(self, folder: Path) -> None:
        """Write them into a folder."""
        write_text(folder / "preprocessor_config.json", json.dumps(_PROCESSOR, indent=2) + "\n")


class ImageData(Data):
    """Prepared images."""

    facts_type = ImageFacts

    @property
    def processor(self) -> ImageProcessor:
        """What prepares images for the model."""
        return ImageProcessor()

    def counts(self, _config: RunConfig) -> tuple[int, int]:
        """Count the images to train on, and those held out."""
        return self.facts.train_images, self.facts.held_out_images

    def reader(self, part: str, _config: RunConfig) -> Callable[[int], Example]:
        """Return a function that reads an image of a part and its class."""
        return Labelled(*(np.load(self.folder / f"{part}_{name}.npy", mmap_mode="r") for name in Labelled._fields)).read

    def describe(self) -> str:
        """Return the source and the number of the images."""
        facts = self.facts
        return (
            f"{facts.source}: {facts.train_images:,} images of {facts.classes} classes to train on, "
            f"{facts.held_out_images:,} held out"
        )


class Vision(Task):
    """A ViT, newly drawn, on gray images."""

    data = ImageData
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
        return ImageData(folder, facts).saved()

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


class Images(NamedTuple):
    """Images to train on, those held out, and where they come from."""

    train: Labelled
    held_out: Labelled
    source: str


def read_images(config: RunConfig) -> Images:
    """Read the images of a run, of which those to train on are bounded by ``max_megabytes``."""
    if config.dataset is not None:
        return _from_dataset(config)
    if not FASHION_MNIST.is_dir():
        raise UserError(
            f"--task vision reads Fashion-MNIST, which is not in {FASHION_MNIST}: {PACKAGE} on Debian or Ubuntu, or "
            "give a --dataset"
        )
    train, held_out = (_labelled(FASHION_MNIST, part) for part in ("train", "t10k"))
    most = _most(config)
    return Images(Labelled(train.pixels[:most], train.labels[:most]), held_out, "Fashion-MNIST")


def _most(config: RunConfig) -> int | None:
    """Return how many images are read; None: all."""
    return None if config.max_megabytes is None else math.ceil(config.max_megabytes * MEGABYTE / SIZE**2)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a compressed IDX file of unsigned bytes, MNIST's format."""
    try:
        data = gzip.decompress(path.read_bytes())
        zero, kind, dimensions = int.from_bytes(data[:2], "big"), data[2], data[3]
        begin = 4 + 4 * dimensions
        shape = [int.from_bytes(data[start : start + 4], "big") for start in range(4, begin, 4)]
        if zero != 0 or kind != _UNSIGNED_BYTES or len(data) != begin + math.prod(shape):
            raise ValueError("its header and its size differ")
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"{path} is no IDX file of bytes ({error}): put it back with {PACKAGE} --reinstall") from error
    return np.frombuffer(data, np.uint8, offset=begin).reshape(shape)


def _labelled(folder: Path, part: str) -> Labelled:
    """Return a part of MNIST's four files."""
    pixels = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    if pixels.shape != (len(labels), SIZE, SIZE) or labels.ndim != 1 or not len(labels):
        raise UserError(
            f"the files {part}-* of {folder} do not belong together: put them back with {PACKAGE} --reinstall"
        )
    return Labelled(pixels, labels.astype(np.int64))


def _from_dataset(config: RunConfig) -> Images:
    """Read a dataset, and hold out every tenth image."""
    found = islice(dataset_rows(config, "none for Fashion-MNIST"), _most(config))
    rows = [_image(row, config) for row in found]
    if len(rows) < HELD_OUT:
        raise UserError(f"--dataset {config.dataset} has {len(rows)} images: give one with at least {HELD_OUT}")
    train, held_out = divide(rows)
    return Images(_stacked(train), _stacked(held_out), dataset_name(config))


def _image(row: dict[str, Any], config: RunConfig) -> tuple[NDArray[np.uint8], int]:
    """Return a row's image, gray and of our size, and its class."""
    image: Any
    label: Any
    image, label = (row.get(str(name)) for name in (config.source_column, config.target_column))
    if not hasattr(image, "convert") or not isinstance(label, int) or label < 0:
        raise UserError(
            f"--dataset {config.dataset} has no images in --source-column {config.source_column} with classes, whole "
            f"numbers, in --target-column {config.target_column}: its columns are {', '.join(sorted(row))}"
        )
    return np.asarray(image.convert("L").resize((SIZE, SIZE)), np.uint8), label


def _stacked(rows: Sequence[tuple[NDArray[np.uint8], int]]) -> Labelled:
    pixels, labels = zip(*rows, strict=True)
    return Labelled(np.stack(pixels), np.asarray(labels, np.int64))
