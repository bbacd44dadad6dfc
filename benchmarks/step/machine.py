"""Where and with what it was measured."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.step.processes import ROOT
from floragrad.cli.machine import available_cores

PACKAGES: Final = (
    "torch",
    "transformers",
    "flora-opt",
    "galore-torch",
    "apollo-torch",
    "bitsandbytes",
    "torchao",
    "floragrad",
)


def about(command: Sequence[str]) -> dict[str, Any]:
    """The machine, the versions, the commit and the command."""
    return {
        "command": " ".join(command),
        "commit": commit(),
        "processor": processor(),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def busy_cores() -> float:
    """How many cores other programs keep busy, over a second: what makes times worthless."""
    return psutil.cpu_percent(interval=1) / 100 * (psutil.cpu_count() or 1)


def processor() -> str:
    """The processor's name, as the system gives it."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is checked out, and whether anything has been changed since."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"
    return f"{head} + uncommitted changes" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def threads_in_words(count: int) -> str:
    """As in "2 threads"."""
    return f"{count} thread{'s' if count != 1 else ''}"
