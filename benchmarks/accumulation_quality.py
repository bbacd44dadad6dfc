"""What gathering gradients as sketches costs in loss: the default job of ``floragrad compare`` in 8 micro-batches.

    python -m benchmarks.accumulation_quality --out runs/accumulation

Each row is one ``floragrad compare`` in a folder of its own, so a stopped row goes on where it was; ``--rows``
does some of them, in several processes if you like, and writes their table.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import quality
from floragrad._text import format_bytes

MICRO_BATCHES = 8
JOB = ("--optimizers", "flora", "--batch-size", "1", "--accumulate", str(MICRO_BATCHES))
JOB += ("--seeds", "0,1,2", "--embedding-lrs", "1e-2", "--eval-every", "500", "--threads", "1")
GRID = ("--lrs", "5e-4,1e-3")


def sketched(dtype: str, ratio: int, projection: str) -> tuple[str, ...]:
    return (
        *("--accumulators", "flora", "--accumulator-dtype", dtype),
        *("--accumulator-ratio", str(ratio), "--accumulator-projection", projection),
    )


PROJECTED = (("int4", 2), ("int4", 4), ("float32", 2), ("float32", 4), ("float32", 8))
ROWS = {
    "exact": ("--accumulators", "exact"),
    "none": ("--accumulators", "none"),
    "int4": sketched("int4", 1, "sign"),
    **{
        f"{dtype}, ρ = {ratio}, {projection}": sketched(dtype, ratio, projection)
        for projection in ("sign", "gaussian")
        for dtype, ratio in PROJECTED
    },
}


def command(row: str) -> list[str]:
    return ["compare", *JOB, *GRID, *ROWS[row]]


def run(row: str, folder: Path) -> dict[str, Any]:
    """The numbers of a row, which is run first, or taken up again, if need be."""
    path = folder / row.replace(" ", "-").replace(",", "").replace("ρ-=-", "ratio-")
    results = path / "table.json"
    if not results.is_file():
        arguments = ["compare", "--resume", str(path)] if path.is_dir() else [*command(row), "--out", str(path)]
        subprocess.run([sys.executable, "-m", "floragrad", *arguments], check=True)
    return dict(json.loads(results.read_text(encoding="utf-8")))


def table(numbers: dict[str, dict[str, Any]]) -> list[str]:
    """One line a row: its bytes and losses."""
    heads = ("gradients kept as", "bytes", "lr", "validation loss", "standard deviation", "of the seeds")
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row, found in numbers.items():
        best = found["rows"][0]
        losses = ", ".join(f"{loss:.4f}" for loss in best["validation_losses"])
        cells = (
            row,
            format_bytes(best["accumulation_bytes"]),
            f"{best['lr']:g}",
            f"{best['validation_loss']:.4f}",
            f"{best['validation_loss_stdev']:.4f}",
            losses,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def grid(numbers: dict[str, dict[str, Any]]) -> list[str]:
    """Everything that was tried on the first seed."""
    tried = {row: {each["lr"]: each["validation_loss"] for each in found["grid"]} for row, found in numbers.items()}
    lrs = sorted({lr for losses in tried.values() for lr in losses})
    lines = ["| gradients kept as | " + " | ".join(f"lr {lr:g}" for lr in lrs) + " |", "|" + " --- |" * (len(lrs) + 1)]
    for row, losses in tried.items():
        lines.append(f"| {row} | " + " | ".join(f"{losses[lr]:.4f}" for lr in lrs) + " |")
    return lines


def as_markdown(numbers: dict[str, dict[str, Any]], arguments: Sequence[str]) -> str:
    about = next(iter(numbers.values()))
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "\n".join(
        [
            "# The loss after gathering gradients",
            "",
            "A Llama of 2.1M parameters, 500 steps of 1,024 tokens in 8 micro-batches, Flora; mean over seeds 0, 1, 2. "
            "Without accumulation a step reads one micro-batch.",
            "",
            *table(numbers),
            "",
            "Everything that was tried, on seed 0:",
            "",
            *grid(numbers),
            "",
            f"- `{shlex.join(['python', '-m', 'benchmarks.accumulation_quality', *arguments])}`",
            f"- {about['machine']}; {versions}",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    given = quality.parser(__doc__, ROWS).parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    numbers = {row: run(row, given.out) for row in given.rows}
    command = sys.argv[1:] if arguments is None else arguments
    (given.out / "table.md").write_text(as_markdown(numbers, command), encoding="utf-8")


if __name__ == "__main__":
    main()
