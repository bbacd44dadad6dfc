"""Descriptions of Debian's packages, from apt's lists: long texts and the line that sums each up."""

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from floragrad.cli.errors import UserError

COMMAND: Final = "apt-get -o Acquire::Languages=en update"
_READER: Final = "/usr/lib/apt/apt-helper"


def read_descriptions(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each package's long description and its synopsis, in the order of the SHA-256 of the packages' names.

    Args:
        folder: Of apt's lists.

    Raises:
        UserError: There are none, or they cannot be read.
    """
    lists = sorted(path for path in folder.glob("*_i18n_Translation-en*") if path.is_file())
    if not lists:
        raise UserError(
            f"--task summarization reads descriptions of Debian's packages, which are not in {folder}: {COMMAND} on "
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
        raise UserError(f"{path} is no list of apt's ({error}): write it again with {COMMAND}") from error
