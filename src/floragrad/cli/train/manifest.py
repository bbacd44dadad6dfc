"""The manifest of a folder: names, sizes and SHA-256 of its files, compared before anything of it is loaded."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from floragrad.cli.disk import read_object, write_text
from floragrad.cli.errors import UserError

MANIFEST: Final = "manifest.json"
_CHUNK: Final = 1 << 20


def digest(path: Path, size: int | None = None) -> dict[str, Any]:
    """Return the size and SHA-256 of a file, or of its first ``size`` bytes."""
    found, count = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK if size is None else min(_CHUNK, size - count)):
            found.update(chunk)
            count += len(chunk)
    return {"bytes": count, "sha256": found.hexdigest()}


def write(folder: Path, paths: Iterable[Path], **facts: Any) -> None:
    """Write the manifest of a folder.

    Args:
        folder: Where it goes.
        paths: Its files; folders and an older manifest among them are passed over.
        **facts: Further entries, as JSON has them.
    """
    own = folder / MANIFEST
    kept = (path for path in sorted(paths) if path.is_file() and path != own)
    files = {path.relative_to(folder).as_posix(): digest(path) for path in kept}
    write_text(own, json.dumps({**facts, "files": files}, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder. ValueError: it is none; OSError: it cannot be read."""
    values = read_object(folder / MANIFEST)
    if not isinstance(values.get("files"), dict):
        raise ValueError("it lists no files")
    return values


def fault(folder: Path) -> str | None:
    """Find the first file of a folder that differs from its manifest. None: all are."""
    if not folder.is_dir():
        return "it is no folder"
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        files = read(folder)["files"]
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is damaged: {error}"
    return next((found for name, wanted in files.items() if (found := _difference(folder / name, name, wanted))), None)


def check(folder: Path, remedy: str) -> None:
    """Refuse a folder with a file that differs from its manifest, and name the remedy."""
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} cannot be verified, for {MANIFEST} is missing (older versions wrote none): put it back, or "
            f"trust the files as they are with python -m floragrad.cli.train.adopt RUN"
        )
    found = fault(folder)
    if found is not None:
        raise UserError(f"{folder} is damaged: {found}: {remedy}")


def _difference(path: Path, name: str, wanted: object) -> str | None:
    """Say how a file differs from its entry."""
    try:
        found = digest(path)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if found == wanted:
        return None
    size = wanted.get("bytes") if isinstance(wanted, dict) else None
    if found["bytes"] != size:
        return f"{name} has {found['bytes']} bytes instead of {size}"
    return f"{name} has other bytes than were written (SHA-256)"
