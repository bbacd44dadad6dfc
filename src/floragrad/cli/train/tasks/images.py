"""Labelled images: Fashion-MNIST from files in the IDX format, or a dataset; small, gray and square."""

import gzip
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from floragrad.cli.errors import UserError
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.order import HELD_OUT, divide
from floragrad.cli.train.sources import MEGABYTE, dataset_name, dataset_rows

SIZE: Final = 28
"""Rows and columns of an image."""
FASHION_MNIST: Final = Path("/usr/share/datasets/fashion-mnist")
PACKAGE: Final = "apt-get install dataset-fashion-mnist"
_UNSIGNED_BYTES: Final = 0x08


class Labelled(NamedTuple):
    """Images, uint8 (n, SIZE, SIZE), and their classes, int64 (n,)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


class Images(NamedTuple):
    """Images to train on, those held out, and where they come from."""

    train: Labelled
    held_out: Labelled
    source: str


def read_images(config: RunConfig) -> Images:
    """Read the images of a run, of which those to train on are bounded by ``max_megabytes``.

    Raises:
        UserError: There are none, or they cannot be read.
    """
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
    """Read a compressed IDX file of unsigned bytes, MNIST's format.

    Raises:
        UserError: It is none.
    """
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
