"""Files that appear whole or not at all, and the reason where a disk refuses them."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SYSTEM_ERROR = re.compile(r"os[ _]error(?:_code)?\W+(\d+)", re.IGNORECASE)
"""Names that Rust (safetensors, tokenizers) and tensorstore (orbax) give the system's error."""
_PROBE_BYTES = 1 << 20


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write under; the file gets its own name when it is on the disk.

    After an error the old file is there, and nothing else.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        put_on_disk(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise
    put_on_disk(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file: it is there whole, or as it was."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_object(text: str, tuples: bool = False) -> dict[str, Any]:
    """Return a JSON object, with tuples for the lists in it where wanted. Other JSON raises ValueError."""
    values = json.loads(text, object_hook=_with_tuples if tuples else None)
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def read_object(path: Path, tuples: bool = False) -> dict[str, Any]:
    """Read the JSON object in a file. See :func:`parse_object`."""
    return parse_object(path.read_text(encoding="utf-8"), tuples)


def put_on_disk(*paths: Path) -> None:
    """Wait until files and the names in folders are written: a power cut may take later changes, not these."""
    if os.name != "posix":  # Windows opens no folders
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder and its content; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refusal(error: BaseException, folder: Path) -> str | None:
    """Return why a folder could not be written, in the system's words; None if the error has another reason.

    Args:
        error: Exception raised while files were written below the folder.
        folder: A new file in it finds out the reason where a library in C++ does not give one.
    """
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, OSError) and each.errno is not None:
            return os.strerror(each.errno)
        named = _SYSTEM_ERROR.search(str(each))
        if named is not None:
            return os.strerror(int(named[1]))
        each = each.__cause__ or each.__context__
    return _refused(folder)


def _refused(folder: Path) -> str | None:
    """Write beyond the end of the folder's largest file: the same limit, quota or full disk refuses that too."""
    largest = max((path.stat().st_size for path in folder.rglob("*") if path.is_file()), default=0)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.seek(largest)
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        return error.strerror
    return None
