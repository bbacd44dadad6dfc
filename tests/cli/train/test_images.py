import json
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture

from floragrad.cli.errors import UserError
from floragrad.cli.train.tasks import images
from floragrad.cli.train.tasks.images import ImageProcessor, Labelled, read_idx, read_images
from tests.cli.train.task_data import task_config, write_idx, write_mnist


def test_an_idx_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", values)
    assert np.array_equal(read_idx(tmp_path / "a.gz"), values)


@pytest.mark.parametrize("damage", ["cut", "text", "longer", "gone"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    write_idx(path, np.zeros((5, 28, 28)))
    if damage == "gone":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-9], "text": b"words", "longer": data + data}[damage])
    with pytest.raises(UserError, match=r"a\.gz is no IDX file of bytes \(.*\): put it back with apt-get install"):
        read_idx(path)


def test_the_test_files_are_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FASHION_MNIST", write_mnist(tmp_path / "mnist", train=20, held_out=7))
    found = read_images(task_config("vision"))
    assert (found.train.pixels.shape, found.held_out.pixels.shape) == ((20, 28, 28), (7, 28, 28))
    assert np.array_equal(found.held_out.labels, read_idx(tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"))
    bounded = read_images(task_config("vision", max_megabytes=0.004))
    assert (len(bounded.train.labels), len(bounded.held_out.labels)) == (6, 7)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FASHION_MNIST", write_mnist(tmp_path / "mnist"))
    write_idx(tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz", np.zeros(29))
    with pytest.raises(UserError, match=r"the files t10k-\* of .* do not belong together"):
        read_images(task_config("vision"))


def write_dataset(folder: Path, count: int) -> Path:
    pictures = [Picture.fromarray(np.full((56, 56, 3), number, np.uint8)) for number in range(count)]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=2)})
    rows = {"image": pictures, "label": [number % 2 for number in range(count)]}
    folder.mkdir()
    Dataset.from_dict(rows, features).to_parquet(folder / "train.parquet")
    return folder


def test_every_tenth_image_of_a_dataset_is_held_out(tmp_path: Path) -> None:
    found = read_images(task_config("vision", dataset=str(write_dataset(tmp_path / "data", 21))))
    assert found.held_out.pixels[:, 0, 0].tolist() == [9, 19]
    assert found.held_out.labels.tolist() == [1, 1]
    assert found.train.pixels.shape == (19, 28, 28)
    with pytest.raises(UserError, match=r"has 9 images: give one with at least 10"):
        read_images(task_config("vision", dataset=str(write_dataset(tmp_path / "few", 9))))


def test_columns_without_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"words": "a", "label": 1}) + "\n")
    message = "has no images in --source-column image with classes.*: its columns are label, words"
    with pytest.raises(UserError, match=message):
        read_images(task_config("vision", dataset=str(tmp_path)))


def test_a_checkpoints_processor_prepares_images_as_training_does(tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    ImageProcessor().save_pretrained(tmp_path)
    pixels = np.arange(784, dtype=np.uint8).reshape(1, 28, 28)
    block = Labelled(pixels, np.array([3])).read(0)
    assert block["labels"] == 3
    assert (block["pixel_values"].min(), block["pixel_values"].max()) == (-1, 1)
    processor = ViTImageProcessorPil.from_pretrained(tmp_path)
    prepared = processor(pixels, input_data_format="channels_first", return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(block["pixel_values"], prepared, atol=1e-6)
