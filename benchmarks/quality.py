"""Train the default job of ``floragrad train`` with many options, and compare validation losses.

    python -m benchmarks.quality low_bit_quality --runs runs/low_bit
    python -m benchmarks.quality accumulation_quality --runs runs/accumulation --rows exact int4
    python -m benchmarks.quality jax_training --runs runs/backends

Every row takes each learning rate on the first seed, and the best one on the others. Every run has a folder: finished
runs are read again, and a stopped one continues from its checkpoint. ``--rows`` selects rows, so that several processes
can share the work.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from benchmarks import harness
from floragrad._text import format_bytes
from floragrad.cli import machine
from floragrad.cli.errors import DivergenceError
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.display import Display
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.run import begin, train

SEEDS = (0, 1, 2)
Options = Mapping[str, Any]


def _sketched(state_dtype: str, ratio: int, projection: str) -> Options:
    names = ("accumulator", "accumulator_dtype", "accumulator_ratio", "accumulator_projection")
    return dict(zip(names, ("flora", state_dtype, ratio, projection), strict=True))


@dataclass(frozen=True)
class Study:
    """Rows of one page.

    Attributes:
        title: Of the page.
        job: Options of all runs; the others are the defaults of ``floragrad train``.
        rows: Options of each row.
        lrs: Learning rates to choose from on the first seed.
    """

    title: str
    job: Options
    rows: Mapping[str, Options]
    lrs: Sequence[float]


_JOB = {"threads": 1, "eval_every": 500, "save_every": 1000, "keep_checkpoint": False}
_PROJECTED = (("int4", 2), ("int4", 4), ("float32", 2), ("float32", 4), ("float32", 8))
STUDIES = {
    "low_bit_quality": Study(
        "The loss with low-bit state",
        _JOB,
        {
            **{f"Flora, {dtype}": {"state_dtype": dtype} for dtype in ("float32", "bfloat16", "int8", "int4")},
            "AdamW": {"optimizer": "adamw"},
            "bitsandbytes AdamW8bit": {"optimizer": "adamw-8bit"},
            "torchao AdamW8bit": {"optimizer": "adamw-8bit-torchao"},
        },
        (5e-4, 1e-3, 2e-3),
    ),
    "accumulation_quality": Study(
        "The loss after gradient accumulation in 8 micro-batches",
        {**_JOB, "batch_size": 1, "accumulate": 8},
        {
            "exact": {"accumulator": "exact"},
            "none": {"accumulator": "none"},
            "int4": _sketched("int4", 1, "sign"),
            **{
                f"{dtype}, ρ = {ratio}, {projection}": _sketched(dtype, ratio, projection)
                for projection in ("sign", "gaussian")
                for dtype, ratio in _PROJECTED
            },
        },
        (5e-4, 1e-3),
    ),
    "jax_training": Study(
        "The default job in PyTorch and in JAX",
        {**_JOB, "eval_every": 50},
        {backend: {"backend": backend} for backend in ("torch", "jax")},
        (1e-3,),
    ),
}


def run(name: str, options: Options, path: Path) -> dict[str, Any]:
    """Train a run unless it is finished; return its summary with the validation losses by step."""
    if not path.is_dir():
        begin(RunConfig.resolve(**options), path)
    folder = RunFolder.open(path)
    if folder.summary() is None:
        try:
            train(folder, Display(Console(), name, brief=True))
        except DivergenceError as error:
            folder.write_summary({"validation_loss": None, "diverged_at": error.step})
    curve = {line["step"]: line["validation_loss"] for line in folder.metrics() if "validation_loss" in line}
    return {**(folder.summary() or {}), "curve": curve}


def find(study: Study, name: str, out: Path) -> tuple[dict[float, Any], float, list[dict[str, Any]]]:
    """Return the summaries of all rates on the first seed, the best rate, and its summaries for all seeds."""

    def of(lr: float, seed: int) -> dict[str, Any]:
        label = f"{name}-lr{lr:g}-seed{seed}".replace(", ", "-").replace("ρ = ", "ratio-").replace(" ", "-")
        return run(label, {**study.job, **study.rows[name], "lr": lr, "seed": seed}, out / label)

    rates = {lr: of(lr, SEEDS[0]) for lr in study.lrs}
    best = min(rates, key=lambda lr: rates[lr]["validation_loss"] or float("inf"))
    return rates, best, [of(best, seed) for seed in SEEDS]


def _loss(summary: Mapping[str, Any]) -> float:
    return summary["validation_loss"] or nan


def _spread(losses: Sequence[float]) -> str:
    return f"{mean(losses):.4f} ± {stdev(losses):.4f}"


def page(study: Study, found: Mapping[str, Any]) -> list[str]:
    """Write the page: the best rates, everything that was tried, and the losses by step where there are several."""
    rows, curves = [], []
    for name, (_, lr, seeds) in found.items():
        losses = [_loss(each) for each in seeds]
        sizes = [format_bytes(seeds[0].get(f"{each}_bytes", 0)) for each in ("optimizer_state", "accumulation")]
        rows.append((name, *sizes, f"{lr:g}", _spread(losses), *[f"{loss:.4f}" for loss in losses]))
        steps = seeds[0]["curve"]
        curves += [(name, step, _spread([each["curve"].get(step, nan) for each in seeds])) for step in steps]
    tried = [(name, *(f"{_loss(each):.4f}" for each in rates.values())) for name, (rates, *_) in found.items()]
    seeds = [f"seed {seed}" for seed in SEEDS]
    lines = [f"# {study.title}", "", "Validation loss of `floragrad train`; mean ± standard deviation over seeds.", ""]
    lines += harness.table(("row", "state", "accumulated gradients", "lr", "loss", *seeds), rows)
    lines += ["", f"Everything that was tried, on seed {SEEDS[0]}:", ""]
    lines += harness.table(("row", *(f"lr {lr:g}" for lr in study.lrs)), tried)
    if len(curves) > 2 * len(rows):
        lines += ["", *harness.table(("row", "step", "loss"), curves)]
    packages = ("floragrad", "torch", "transformers", "tokenizers", "bitsandbytes", "torchao", "jax", "flax", "optax")
    return [*lines, "", *harness.environment(packages)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--rows", nargs="+", help="do these rows only (default: all)")
    given = parser.parse_args(arguments)
    study = STUDIES[given.study]
    if unknown := set(given.rows or ()) - study.rows.keys():
        parser.error(f"--rows {', '.join(sorted(unknown))}: choose from {'; '.join(study.rows)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # of bitsandbytes' kernels, which do not ask torch
    for backend in sorted({row.get("backend", "torch") for row in study.rows.values()}):
        machine.prepare(backend, hub=False)
    given.runs.mkdir(parents=True, exist_ok=True)
    written = page(study, {name: find(study, name, given.runs) for name in given.rows or study.rows})
    harness.publish(given, given.study, written)
    print("\n".join(written))


if __name__ == "__main__":
    main()
