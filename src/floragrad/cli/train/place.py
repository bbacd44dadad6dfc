"""Folder of a run or a comparison, and the options beside it."""

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from floragrad.cli.errors import UserError
from floragrad.cli.options import option, option_name
from floragrad.cli.presets import PRESETS
from floragrad.cli.train.config import OPTIONS, OUTPUT


@dataclass(frozen=True)
class Place:
    """Options of the folder of a run or a comparison."""

    out: Path | None = option(
        "A new folder for everything that is written.",
        OUTPUT,
        default=None,
        shown="runs/<model>-<optimizer>-<time>; runs/compare-<model>-<time>",
        metavar="FOLDER",
    )
    resume: Path | None = option(
        "Continue what stopped in this folder, with its own options: give no others.",
        OUTPUT,
        default=None,
        metavar="FOLDER",
    )


def refuse_beside_resume(given: dict[str, Any], *allowed: str) -> None:
    """Refuse options beside ``--resume``."""
    others = [option_name(name) for name in given if name not in allowed]
    if others:
        raise UserError(
            f"--resume continues with the options that were given then, not {', '.join(others)}: give it alone"
        )


def run_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are fields of a configuration; a model's folder by its whole path."""
    fields = {name: value for name, value in given.items() if name in OPTIONS}
    if "model" in fields and fields["model"] not in PRESETS and Path(fields["model"]).is_dir():
        fields["model"] = str(Path(fields["model"]).resolve())
    return fields


def new_name(name: str) -> Path:
    """Return a folder below ``runs`` that is not there yet, and that no other process prepares."""
    stem = f"{name}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    candidates = (Path("runs", stem if number == 1 else f"{stem}-{number}") for number in range(1, 1000))
    return next(path for path in candidates if not path.exists() and not any(path.parent.glob(f".{path.name}.*")))
