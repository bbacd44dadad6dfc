"""Pairs of a source and a target: words of a dictionary in dictd's format, descriptions of packages, or a dataset."""

import gzip
import hashlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from floragrad.cli.errors import UserError
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.sources import Budget, dataset_name, dataset_rows

DICTIONARY: Final = Path("/usr/share/dictd/freedict-deu-eng")
"""The dictionary's files, but for what their names end with."""
PACKAGE: Final = "apt-get install dict-freedict-deu-eng"
LISTS: Final = Path("/var/lib/apt/lists")
UPDATE: Final = "apt-get -o Acquire::Languages=en update"
_READER: Final = "/usr/lib/apt/apt-helper"
_DIGITS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_VALUES: Final = {digit: value for value, digit in enumerate(_DIGITS)}
_MARKS: Final = re.compile(r"\s*(<[^>]*>|\[[^]]*\])\s*")
_PRONOUNCED: Final = re.compile(r" /(?! )")
_SENTENCE: Final = (".", "!", "?")


class Pairs(NamedTuple):
    """Sources and targets, in the order that decides which are held out, and where they come from."""

    pairs: list[tuple[str, str]]
    source: str


def read_pairs(config: RunConfig) -> Pairs:
    """Read the pairs of a run, up to its ``max_megabytes``; each source once, with its first target."""
    if config.dataset is not None:
        found, name = _from_dataset(config), dataset_name(config)
    elif config.task == "summarization":
        found, name = read_descriptions(LISTS), "descriptions of Debian's packages"
    else:
        found, name = _from_dictionary(DICTIONARY), "FreeDict's German-English dictionary"
    pairs: dict[str, str] = {}
    budget = Budget(config.max_megabytes)
    for source, target in found:
        if budget.spent:
            break
        if source and target and source not in pairs:
            pairs[source] = target
            budget.spend(len(f"{source}{target}".encode()))
    if not pairs:
        raise UserError(f"there are no pairs of texts in {name}: give another --dataset")
    return Pairs(list(pairs.items()), name)


def _from_dictionary(stem: Path) -> Iterator[tuple[str, str]]:
    """Yield headwords and translations in the order of the SHA-256 of their places: mixed, and always the same."""
    index, text = stem.with_name(f"{stem.name}.index"), stem.with_name(f"{stem.name}.dict.dz")
    if not (index.is_file() and text.is_file()):
        raise UserError(
            f"--task seq2seq reads FreeDict's German-English dictionary, which is not in {stem.parent}: {PACKAGE} on "
            "Debian or Ubuntu, or give a --dataset"
        )
    try:
        lines = index.read_text(encoding="utf-8").splitlines()
        places = {tuple(line.split("\t")[1:3]) for line in lines if not line.startswith("00database")}
        entries = gzip.decompress(text.read_bytes())
        for offset, size in sorted(places, key=lambda place: hashlib.sha256("\t".join(place).encode()).digest()):
            begin = _number(offset)
            yield entry(entries[begin : begin + _number(size)].decode("utf-8"))
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{stem}.* is no dictionary of dictd ({error}): {PACKAGE} --reinstall") from error


def _number(digits: str) -> int:
    """Return a number of dictd's index, in base 64."""
    number = 0
    for digit in digits:
        number = 64 * number + _VALUES[digit]
    return number


def entry(text: str) -> tuple[str, str]:
    r"""Return the headword and the first translation of a dictionary's entry; empty where there is none.

    The headword stands before its pronunciation, translations on the next line with commas between; a sentence is
    translated by the whole line. Marks of grammar and of subjects are left out.

    Example:
        >>> entry("Knautschzone /knaʊtʃtsˈoːnə/ <fem, n, sg>\n [auto] crush-collapsible zone <n>, crumple zone <n>\n")
        ('Knautschzone', 'crush-collapsible zone')
        >>> entry("Ja, und? /jˈaː/\nYes, so what?\n")
        ('Ja, und?', 'Yes, so what?')
    """
    head, _, rest = text.partition("\n")
    headword = _unmarked(_PRONOUNCED.split(head)[0])
    line = _unmarked(_PRONOUNCED.split(rest.partition("\n")[0])[0])
    return headword, line if headword.endswith(_SENTENCE) else line.partition(", ")[0].strip(" ,")


def _unmarked(text: str) -> str:
    return _MARKS.sub(" ", text).strip().replace(" ,", ",")


def _from_dataset(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the texts of a dataset's two columns; rows without them (null) are left out."""
    for row in dataset_rows(config, "none for the default data"):
        source, target = (_value(row, str(name)) for name in (config.source_column, config.target_column))
        if not (isinstance(source, str | None) and isinstance(target, str | None)):
            raise UserError(
                f"--dataset {config.dataset} has no texts in --source-column {config.source_column} and "
                f"--target-column {config.target_column}: its columns are {', '.join(_names(row))}"
            )
        yield (source or "").strip(), (target or "").strip()


def _value(row: dict[str, Any], name: str) -> Any:
    """Return the value of a column, or of a part of it: ``"translation.de"``; False where there is none."""
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return value


def _names(row: dict[str, Any]) -> list[str]:
    """Return the names of a row's columns and their parts."""
    return sorted(
        name
        for key, value in row.items()
        for name in ([f"{key}.{part}" for part in value] if isinstance(value, dict) else [key])
    )


def read_descriptions(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the long description and synopsis of each package of apt's lists, in the order of the names' SHA-256."""
    lists = sorted(path for path in folder.glob("*_i18n_Translation-en*") if path.is_file())
    if not lists:
        raise UserError(
            f"--task summarization reads descriptions of Debian's packages, which are not in {folder}: {UPDATE} on "
            "Debian or Ubuntu, or give a --dataset"
        )
    found = dict(entry for path in lists for entry in _entries(_text(path)))
    for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield description(found[name])


def _entries(text: str) -> Iterator[tuple[str, str]]:
    """Yield each package's name, and its synopsis with the lines of its description."""
    for paragraph in text.split("\n\n"):
        fields, _, value = paragraph.partition("\nDescription-en: ")
        yield fields.partition("Package: ")[2].partition("\n")[0], value


def description(value: str) -> tuple[str, str]:
    r"""Return the long description and the synopsis of an entry; any white space is one space.

    Example:
        >>> description("line editor\n ed edits lines.\n .\n It is\n  old.\n")
        ('ed edits lines. It is old.', 'line editor')
    """
    synopsis, _, lines = value.partition("\n")
    return " ".join(" ".join(line for line in lines.splitlines() if line != " .").split()), synopsis.strip()


def _text(path: Path) -> str:
    """Return a list's text; apt itself knows how it has compressed it."""
    try:
        if path.name.endswith("Translation-en"):
            return path.read_text(encoding="utf-8")
        return subprocess.run([_READER, "cat-file", path], check=True, capture_output=True).stdout.decode("utf-8")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise UserError(f"{path} is no list of apt's ({error}): write it again with {UPDATE}") from error
