"""Results of ``benchmarks.step`` by the kind of their rounds: where the reference was slow, and where it was fast.

    python -m benchmarks.step_rounds benchmarks/results/step.json

A shared machine may change its speed within a run, for some of what is timed more than for the rest; a median over all
rounds is then of neither state. Rounds are told apart by the time of fused AdamW in them: above or below the middle
between its first and its last tenth. For every table: how many rounds of each kind an optimizer was in, and the medians
of their ratios.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.step.report import heading
from floragrad._text import format_table

Cells = list[tuple[str, ...]]


def border(run: Mapping[str, Any]) -> float:
    """Seconds of the reference between the two kinds of a run's rounds."""
    seconds = [each for row in run["rows"] for each in row["reference_seconds"]]
    fast, *_, slow = quantiles(seconds, n=10, method="inclusive")
    return (fast + slow) / 2


def by_kind(row: Mapping[str, Any], limit: float) -> tuple[list[float], list[float]]:
    """The ratios of an optimizer's rounds in which the reference took longer than the limit, and of the others.

    Example:
        >>> by_kind({"seconds": [3.0, 3.0], "reference_seconds": [4.0, 2.0]}, 3.0)
        ([0.75], [1.5])
    """
    rounds = list(zip(row["seconds"], row["reference_seconds"], strict=True))
    slow = [own / other for own, other in rounds if other > limit]
    return slow, [own / other for own, other in rounds if other <= limit]


def cells(run: Mapping[str, Any]) -> Cells:
    """The table of one run."""
    found: Cells = [("optimizer", "rounds", "reference slow", "rounds", "reference fast")]
    limit = border(run)
    for row in run["rows"]:
        kinds = by_kind(row, limit)
        found.append((row["name"], *(text for kind in kinds for text in (str(len(kind)), _median(kind)))))
    return found


def _median(ratios: list[float]) -> str:
    return f"{median(ratios):.2f}" if ratios else "—"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what --out of benchmarks.step wrote, with .json")
    given = parser.parse_args()
    for run in json.loads(given.results.read_text(encoding="utf-8"))["runs"]:
        if run["part"] != "epochs" and any(row["reference_seconds"] for row in run["rows"]):
            print("\n".join([heading(run), "", *format_table(cells(run))]), end="\n\n")


if __name__ == "__main__":
    main()
