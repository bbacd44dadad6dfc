"""Sources of text: files, a dataset, or the standard library of the running interpreter."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from floragrad.cli.errors import UserError
from floragrad.cli.train.config import RunConfig

MEGABYTE = 1_000_000
NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders of the standard library that hold installed packages or tests."""


@dataclass(frozen=True)
class Documents:
    """The texts of a run, in the order that decides which of them are held out.

    Attributes:
        texts: One string a document.
        source: Where they come from, in a few words.
        skipped: Left out because they are no text: files of a folder that are not UTF-8, and null rows.
        validation: Other texts to validate with; None: some of these are held out.
    """

    texts: list[str]
    source: str
    skipped: int = 0
    validation: "Documents | None" = None


def read_documents(config: RunConfig) -> Documents:
    """Read the text that ``config`` names, up to its ``max_megabytes``, and what it names to validate with.

    Files come in the order of the SHA-256 of their names: the same on every machine, and mixed, so that a
    bounded corpus and the held-out documents are samples of all of them.
    """
    files = list(_named_files("--text", config.text))
    held_out = list(_named_files("--validation-text", config.validation_text))
    for path in {file.path.resolve() for file in files} & {file.path.resolve() for file in held_out}:
        raise UserError(f"{path} belongs to --text and to --validation-text: leave it out of one of them")
    if config.dataset is not None:
        documents = _from_dataset(config)
    elif config.text:
        documents = _from_files(files, ", ".join(config.text), config.max_megabytes)
    else:
        documents = _from_files(list(_standard_library()), "the standard library's source", config.max_megabytes)
    if config.validation_text:
        documents = replace(documents, validation=_from_files(held_out, ", ".join(config.validation_text), None))
    for each in (documents, documents.validation):
        if each is not None and not each.texts:
            raise UserError(f"there is no text in {each.source}: give files that are UTF-8 and not empty")
    return documents


@dataclass(frozen=True)
class _File:
    """A file, the name that orders it, and whether the user asked for it by name."""

    path: Path
    name: str
    named: bool

    @property
    def order(self) -> tuple[str, str]:
        return hashlib.sha256(self.name.encode("utf-8", "surrogateescape")).hexdigest(), str(self.path)


def _standard_library() -> Iterator[_File]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _files_below(root):
        relative = path.relative_to(root)
        if path.suffix == ".py" and not NOT_SOURCE.intersection(relative.parts):
            yield _File(path, relative.as_posix(), named=False)


def _named_files(option: str, arguments: Iterable[str]) -> Iterator[_File]:
    """Yield the files behind an option: files, folders with everything in them, and patterns."""
    seen = set()
    for argument in arguments:
        matches = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))
        if not matches:
            raise UserError(f"{option} {argument} does not exist: give files, folders or patterns like 'books/*.txt'")
        for match in map(Path, matches):
            below = _files_below(match) if match.is_dir() else [match]
            for path in below:
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    name = path.relative_to(match) if match.is_dir() else path
                    yield _File(path, name.as_posix(), named=not match.is_dir())


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file below ``folder`` whose path has no hidden part."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _from_files(files: list[_File], source: str, max_megabytes: float | None) -> Documents:
    texts, skipped, budget = [], 0, Budget(max_megabytes)
    for file in sorted(files, key=lambda file: file.order):
        if budget.spent:
            break
        text = _read(file)
        if text is None:
            skipped += 1
        elif text.strip():
            texts.append(budget.take(text))
    return Documents(texts, source, skipped)


def _read(file: _File) -> str | None:
    """Return the file's text; None where a folder's file is not text."""
    try:
        text = file.path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{file.path} cannot be read ({error.strerror}): give readable files") from error
    except UnicodeDecodeError as error:
        if file.named:
            raise UserError(f"{file.path} is not UTF-8 text ({error.reason}): convert it, or leave it out") from error
        return None
    return None if "\0" in text and not file.named else text


class Budget:
    """Counts bytes down, and cuts the text in which they end."""

    def __init__(self, megabytes: float | None) -> None:
        self._left = None if megabytes is None else int(megabytes * MEGABYTE)

    @property
    def spent(self) -> bool:
        """True when nothing is left."""
        return self._left is not None and self._left <= 0

    def spend(self, size: int) -> None:
        """Count bytes that are taken whole."""
        if self._left is not None:
            self._left -= size

    def take(self, text: str) -> str:
        """Count the bytes of a text. Returns it, cut where they end."""
        if self._left is None:
            return text
        data = text.encode("utf-8")
        if len(data) > self._left:
            text = data[: self._left].decode("utf-8", "ignore")
        self._left -= len(data)
        return text


def dataset_rows(config: RunConfig, instead: str = "--text") -> Iterator[dict[str, Any]]:
    """Stream the rows of ``--dataset`` in its own order, or refuse it and name what can be given ``instead``."""
    import datasets

    try:
        yield from datasets.load_dataset(
            config.dataset, config.dataset_config, split=config.dataset_split, streaming=True
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--dataset {config.dataset} cannot be loaded ({reason}): give the name of a dataset that can be "
            f"reached, a folder with its files, or {instead}"
        ) from error


def dataset_name(config: RunConfig) -> str:
    """Return the name of a dataset and its split."""
    return f"{config.dataset} ({config.dataset_split})"


def _from_dataset(config: RunConfig) -> Documents:
    """Read a dataset's column of text; rows without any (null) are left out and counted."""
    texts, skipped, budget, name = [], 0, Budget(config.max_megabytes), config.text_column
    assert name is not None
    for row in dataset_rows(config):
        if budget.spent:
            break
        if name not in row:
            columns = ", ".join(sorted(row))
            raise UserError(f"--text-column {name} is no text of {config.dataset}: its columns are {columns}")
        text = row[name]
        if text is None:
            skipped += 1
        elif not isinstance(text, str):
            raise UserError(
                f"--text-column {name} of {config.dataset} holds a value of type {type(text).__name__}, not text: give "
                f"a column of text, its columns are {', '.join(sorted(row))}"
            )
        elif text.strip():
            texts.append(budget.take(text))
    return Documents(texts, dataset_name(config), skipped)
