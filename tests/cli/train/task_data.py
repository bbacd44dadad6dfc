"""Made-up data of the tasks beside language modeling, in the formats of Debian's packages, and short runs."""

import gzip
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from floragrad.cli.presets import TASKS
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.tasks import images, pairs

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
WORDS = {"Haus": "house", "Hund": "dog", "Baum": "tree", "Licht": "light", "Wasser": "water", "Stein": "stone"}
SHORT = {"steps": 8, "batch_size": 4, "eval_blocks": 10, "eval_every": 4, "save_every": 4, "threads": 1}
FAST = {"vision": SHORT, "seq2seq": {**SHORT, "vocab_size": 320, "sequence_length": 12}}
MEASURES = {"vision": {"accuracy"}, "seq2seq": {"bleu", "token_accuracy"}}


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write an array of bytes in MNIST's format."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def write_mnist(folder: Path, train: int = 90, held_out: int = 30) -> Path:
    """Write MNIST's four files: images of three classes, each brighter than the one before."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", held_out)):
        labels = generator.integers(0, 3, count)
        write_idx(
            folder / f"{part}-images-idx3-ubyte.gz",
            labels[:, None, None] * 80 + generator.integers(0, 60, (count, 28, 28)),
        )
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


def number(value: int) -> str:
    """A number of dictd's index."""
    return DIGITS[value] if value < 64 else number(value // 64) + DIGITS[value % 64]


def write_dictionary(folder: Path, entries: list[str]) -> Path:
    """Write a dictionary of dictd's; each entry stands in the index twice. Returns what its files' names begin with."""
    folder.mkdir(parents=True)
    text, lines = b"", []
    for place, entry in enumerate(["FreeDict\n", *entries]):
        size = len(entry.encode())
        names = ["00databaseinfo"] if place == 0 else [f"wort {place}", f"wort-{place}"]
        lines += [f"{name}\t{number(len(text))}\t{number(size)}\n" for name in names]
        text += entry.encode()
    (folder / "made-up.dict.dz").write_bytes(gzip.compress(text))
    (folder / "made-up.index").write_text("".join(sorted(lines)), encoding="utf-8")
    return folder / "made-up"


def entries(count: int = 120) -> list[str]:
    """Phrases of five words and their translations."""
    generator = random.Random(0)
    chosen = [generator.choices(list(WORDS), k=5) for _ in range(count)]
    return [f"{' '.join(words)} /a/ <n>\n{' '.join(WORDS[word] for word in words)} <n>, other\n" for words in chosen]


def write_descriptions(folder: Path, count: int = 120) -> Path:
    """Write a list of apt's: each synopsis is the first three of the twelve words of its description."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    texts = [" ".join(generator.choices(list(WORDS.values()), k=12)) for _ in range(count)]
    fields = "Package: made-up-{}\nDescription-md5: {}\nDescription-en: {}\n {}\n .\n {}\n"
    paragraphs = [
        fields.format(number, "0" * 32, " ".join(words[:3]), " ".join(words[:6]), " ".join(words[6:]))
        for number, words in enumerate(text.split() for text in texts)
    ]
    name = "deb.debian.org_debian_dists_bookworm_main_i18n_Translation-en"
    (folder / name).write_text("\n".join(paragraphs), encoding="utf-8")
    return folder


@pytest.fixture
def made_up(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up data in the place of the packages', and small models."""
    folder = tmp_path_factory.mktemp("data")
    monkeypatch.setattr(images, "FASHION_MNIST", write_mnist(folder / "mnist"))
    monkeypatch.setattr(pairs, "DICTIONARY", write_dictionary(folder / "dictd", entries()))
    monkeypatch.setattr(pairs, "LISTS", write_descriptions(folder / "lists"))
    for name in FAST:
        small = replace(TASKS[name]["tiny"], hidden_size=48, intermediate_size=64, heads=2, layers=1)
        monkeypatch.setitem(TASKS[name], "tiny", small)


def task_config(task: str, **options: Any) -> RunConfig:
    """A configuration of a run that takes about a second."""
    return RunConfig.resolve(task=task, **{**FAST[task], **options})
