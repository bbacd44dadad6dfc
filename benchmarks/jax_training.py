"""The default job of ``floragrad train`` with both backends, side by side: validation losses over the steps.

    python -m benchmarks.jax_training --out runs/backends

Each run has a folder of its own, so a stopped one goes on where it was, and finished ones are not done again.
The table is written into the folder.
"""

import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from benchmarks import quality
from floragrad.cli.train.folder import RunFolder

BACKENDS, SEEDS = ("torch", "jax"), (0, 1, 2)
JOB = ("train", "--threads", "1", "--no-keep-checkpoint")


def run(folder: Path, backend: str, seed: int) -> RunFolder:
    """A finished run, which is begun or taken up again if need be."""
    path = folder / f"{backend}-{seed}"
    if not path.is_dir():
        arguments = [*JOB, "--backend", backend, "--seed", str(seed), "--out", str(path)]
        subprocess.run([sys.executable, "-m", "floragrad", *arguments], check=True)
    elif RunFolder.open(path).summary() is None:
        subprocess.run([sys.executable, "-m", "floragrad", "train", "--resume", str(path)], check=True)
    return RunFolder.open(path)


def curve(found: RunFolder) -> dict[int, float]:
    """The validation loss by step."""
    return {line["step"]: line["validation_loss"] for line in found.metrics() if "validation_loss" in line}


def as_markdown(runs: dict[tuple[str, int], RunFolder]) -> str:
    summaries = {backend: runs[backend, SEEDS[0]].summary() or {} for backend in BACKENDS}
    curves = {which: curve(found) for which, found in runs.items()}
    heads = ["step", *(f"{backend}, {what}" for backend in BACKENDS for what in ("mean ± deviation", "each seed"))]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for step in curves[BACKENDS[0], SEEDS[0]]:
        cells = [str(step)]
        for backend in BACKENDS:
            losses = [curves[backend, seed][step] for seed in SEEDS]
            cells += [f"{mean(losses):.4f} ± {stdev(losses):.4f}", ", ".join(f"{loss:.4f}" for loss in losses)]
        lines.append(f"| {' | '.join(cells)} |")
    versions = {name: number for summary in summaries.values() for name, number in summary["versions"].items()}
    return "\n".join(
        [
            "# The default job in PyTorch and in JAX",
            "",
            "Validation loss of `floragrad train`: a Llama of 2.1M parameters, Flora, 500 steps of 1,024 tokens.",
            f"Mean and standard deviation over seeds {', '.join(map(str, SEEDS))}. A seed gives both backends the same",
            "order of blocks, and each its own weights.",
            "",
            *lines,
            "",
            "- `python -m benchmarks.jax_training --out runs/backends`, which runs",
            f"  `floragrad {' '.join(JOB)} --backend B --seed S` for each",
            f"- {summaries['jax']['machine']}; {', '.join(f'{name} {number}' for name, number in versions.items())}",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    given = quality.parser(__doc__).parse_args(arguments)
    runs = {(backend, seed): run(given.out, backend, seed) for seed, backend in product(SEEDS, BACKENDS)}
    (given.out / "table.md").write_text(as_markdown(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
