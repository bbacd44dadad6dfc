"""Shared by all benchmarks: interleaved timing, ratios to a reference, and pages of results.

Milliseconds depend on the machine and on its other work. A benchmark here runs everything that it compares in rounds
of one process, and claims medians of each round's ratio to a reference, with quartiles.
"""

import argparse
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final, NamedTuple

import psutil

ROOT: Final = Path(__file__).resolve().parents[1]
PAUSE: Final = 0.03
"""Seconds between two turns: OpenMP's threads spin for some 10 ms after an operation, then sleep."""
ACTIVATION: Final = 30 * 2**20
"""Bytes to allocate and free once, as training does with activations: until then glibc returns every freed buffer to
the system, and each operation pays for new pages."""


@dataclass
class Timed:
    """Work that takes its turn in each round.

    Attributes:
        work: The timed call.
        before: An untimed call before each timed one.
        seconds: Of the measured rounds, in order.
        error: The exception that ended its turns; empty where there was none.
    """

    work: Callable[[], object]
    before: Callable[[], object] = lambda: None
    seconds: list[float] = field(default_factory=list)
    error: str = ""


def interleave(rows: Iterable[Timed], rounds: int, warm_up: int = 3, pause: float | None = None) -> None:
    """Run every row once a round, in a new random order, and record the seconds.

    Args:
        rows: Work to time. A row that raises takes no more turns, and keeps the error.
        rounds: Measured rounds.
        warm_up: Rounds before them, which are not recorded.
        pause: Seconds before each turn; the default is :data:`PAUSE`.
    """
    bytearray(ACTIVATION)
    order, playing = random.Random(0), list(rows)
    for number in range(-warm_up, rounds):
        for row in order.sample(playing, len(playing)):
            time.sleep(PAUSE if pause is None else pause)
            try:
                row.before()
                start = time.perf_counter()
                row.work()
                seconds = time.perf_counter() - start
            except Exception as error:
                row.error = one_line(error)
                playing.remove(row)
                continue
            if number >= 0:
                row.seconds.append(seconds)


class Ratio(NamedTuple):
    """The median of the rounds' ratios, and their first and third quartile."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} – {self.high:.2f})"


def ratio(own: Sequence[float], reference: Sequence[float]) -> Ratio | None:
    """Compare the seconds of two rows round by round; None where there is no round of both.

    Example:
        >>> ratio([2.0, 20.0, 9.0], [1.0, 10.0, 3.0])
        Ratio(median=2.0, low=2.0, high=2.5)
    """
    ratios = [first / second for first, second in zip(own, reference, strict=False)]
    if len(ratios) < 2:
        return Ratio(*ratios * 3) if ratios else None
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return Ratio(median(ratios), low, high)


def milliseconds(seconds: Sequence[float]) -> str:
    """Format the median of seconds as milliseconds."""
    return f"{1e3 * median(seconds):.1f}" if seconds else "—"


def one_line(error: Exception) -> str:
    """Name an exception in one line that holds no path of this machine."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for place in (sys.prefix, sys.base_prefix, str(ROOT), str(Path.home())):
        text = text.replace(place, "…")
    return text[:200]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Format a Markdown table."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(packages: Iterable[str]) -> list[str]:
    """List the command, the commit, the machine and the versions of installed packages, as lines of Markdown."""
    script = Path(sys.argv[0])
    command = shlex.join(["python", "-m", f"{script.parent.name or 'benchmarks'}.{script.stem}", *sys.argv[1:]])
    installed = {found.metadata["Name"] for found in distributions()}
    found = [f"{name} {version(name)}" for name in packages if name in installed]
    memory = psutil.virtual_memory().total / 1e9
    return [
        f"- `{command}`, at commit {commit()}",
        f"- {_processor()}, {cores()} cores, {memory:.0f} GB of memory, {platform.system()} {platform.machine()}",
        f"- {', '.join([f'python {platform.python_version()}', *found])}",
    ]


def commit() -> str:
    """Return the commit that is checked out, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + (" + uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parser(description: str | None) -> argparse.ArgumentParser:
    """Make the command line that all benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the page (default: %(default)s)"
    )
    made.add_argument(
        "--raw", type=Path, default=ROOT / "runs" / "benchmarks", help="folder of raw results (default: %(default)s)"
    )
    return made


def publish(given: argparse.Namespace, name: str, page: Sequence[str], raw: Mapping[str, Any] | None = None) -> None:
    """Write a page of results, and raw results as JSON where there are any."""
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{name}.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    if raw is not None:
        given.raw.mkdir(parents=True, exist_ok=True)
        (given.raw / f"{name}.json").write_text(json.dumps(raw) + "\n", encoding="utf-8")
