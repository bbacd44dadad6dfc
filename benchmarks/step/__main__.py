"""What a step of each optimizer costs: time, state, temporaries, the first step, epochs, growth.

    python -m benchmarks.step --out benchmarks/results/step

Every optimizer is a process of its own with the same parameters and gradients, and they take turns: leave the machine
alone meanwhile. What is claimed are medians of each round's ratio to fused AdamW. The results are written after every
part, as JSON and as a page of Markdown, with a picture of the growth.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.step import picture
from benchmarks.step.figures import epoch_row, row
from benchmarks.step.goals import goal_cells
from benchmarks.step.machine import about, busy_cores
from benchmarks.step.measure import Progress, measure
from benchmarks.step.optimizers import FUSED
from benchmarks.step.plan import PARTS, Run, Wanted
from benchmarks.step.report import cells, heading, markdown, troubles
from benchmarks.step.shapes import NAMES, largest, parameters
from floragrad._text import format_table
from floragrad.cli.machine import available_cores


def measured(run: Run, progress: Progress) -> dict[str, Any]:
    """One run and its figures."""
    busy = busy_cores()
    found = measure(run.subjects, run.reference, run.settings, progress)
    rows = [
        epoch_row(each) if run.part == "epochs" and each.subject.entry != FUSED else row(each)
        for each in found.values()
    ]
    return {
        "part": run.part,
        "shapes": run.shapes,
        "parameters": parameters(run.shapes),
        "largest_bytes": 4 * largest(run.shapes),
        **vars(run.settings),
        "busy_cores": busy,
        "rows": rows,
    }


def write(results: dict[str, Any], out: Path) -> None:
    """The results so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn = out.with_name(f"{out.name}_growth.png")
    is_drawn = picture.save(results, drawn)
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(results, drawn.name if is_drawn else None), encoding="utf-8")


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several: dict[str, Any] = {"type": lambda text: text.split(","), "metavar": "A,B"}
    parser.add_argument("--parts", default=list(PARTS), help=f"of {','.join(PARTS)} (default: all)", **several)
    parser.add_argument("--shapes", default=list(NAMES), help=f"of {','.join(NAMES)} (default: all)", **several)
    parser.add_argument("--threads", default=["1", "all"], help="numbers, or all (default: 1,all)", **several)
    parser.add_argument(
        "--dtypes", default=["float32", "bfloat16"], help="of the parameters (default: float32,bfloat16)", **several
    )
    parser.add_argument("--rounds", type=int, default=15, help="measured steps on GPT-2 small's layers (default: 15)")
    parser.add_argument("--model-rounds", type=int, default=10, help="the same on whole models (default: 10)")
    parser.add_argument(
        "--limit",
        type=float,
        default=60,
        help="seconds of steps after which an optimizer leaves a table that the goals do not need; 0: never "
        "(default: 60)",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="optimizers whose name contains this, and the reference; may be given several times",
    )
    parser.add_argument("--out", type=Path, help="write this path with .json, .md and _growth.png")
    found = parser.parse_args(given)
    for name, allowed in (("parts", PARTS), ("shapes", NAMES), ("dtypes", ("float32", "bfloat16"))):
        unknown = set(getattr(found, name)) - set(allowed)
        if unknown:
            parser.error(f"--{name} {','.join(sorted(unknown))}: choose from {','.join(allowed)}")
    if not all(each == "all" or (each.isdecimal() and int(each) > 0) for each in found.threads):
        parser.error(f"--threads {','.join(found.threads)}: give numbers, or all")
    if min(found.rounds, found.model_rounds) < 1:
        parser.error("--rounds and --model-rounds: at least 1")
    return found


def wanted(given: argparse.Namespace) -> Wanted:
    """What the command line asks for."""
    threads = sorted({available_cores() if each == "all" else int(each) for each in given.threads})
    limit = given.limit or None
    return Wanted(given.parts, given.shapes, threads, given.dtypes, given.rounds, given.model_rounds, limit, given.only)


def main() -> None:
    given = arguments(sys.argv[1:])
    start = time.monotonic()

    def progress(words: str) -> None:
        print(f"{time.monotonic() - start:7.0f} s  {words}", file=sys.stderr, flush=True)

    command = ["python", "-m", "benchmarks.step", *map(shlex.quote, sys.argv[1:])]
    results: dict[str, Any] = {"about": about(command), "runs": []}
    runs = wanted(given).runs()
    if not runs:
        sys.exit(f"nothing to measure: no optimizer's name contains {' or '.join(given.only)}")
    for number, run in enumerate(runs, start=1):
        progress(f"{number} of {len(runs)}, {run.title}")
        results["runs"].append(measured(run, progress))
        done = results["runs"][-1]
        print("\n".join([heading(done), "", *format_table(cells(done)), "", *troubles(done)]), end="\n\n", flush=True)
        if given.out:
            write(results, given.out)
    print("\n".join(format_table(goal_cells(results))))


if __name__ == "__main__":
    main()
