"""Results of the step benchmark, made up."""

from typing import Any

from benchmarks.step.optimizers import FUSED
from benchmarks.step.plan import PARTS, Run, Wanted
from benchmarks.step.shapes import LAYERS

ABOUT = {
    "command": "python -m benchmarks.step",
    "commit": "0123456789ab",
    "processor": "a processor",
    "cores": 2,
    "memory_bytes": 24_000_000_000,
    "system": "Linux x86_64",
    "versions": {"python": "3.11", "torch": "2.13.0"},
}
LARGEST_BYTES = 4_000_000


def wanted(**changes: Any) -> Wanted:
    asked: dict[str, Any] = {
        "parts": PARTS,
        "shapes": [LAYERS, "t5-small"],
        "threads": [1, 2],
        "dtypes": ["float32", "bfloat16"],
        "rounds": 15,
        "model_rounds": 10,
        "limit": 60.0,
        "only": (),
    }
    return Wanted(**{**asked, **changes})


def made_up_row(name: str, shapes: str = LAYERS, **changes: Any) -> dict[str, Any]:
    row = {
        "name": name,
        "shapes": shapes,
        "steps": 10,
        "ratio": 1.0,
        "quartiles": [0.9, 1.1],
        "median_ms": 50.0,
        "first_seconds": 0.5,
        "state_bytes": 1000,
        "peak_bytes": 0,
        "trouble": "",
        "seconds": [0.05] * 10,
        "reference_seconds": [0.05] * 10,
    }
    return {**row, **changes}


def made_up_run(run: Run, **changes: dict[str, Any]) -> dict[str, Any]:
    """A run in which every step takes as long, but for what is said of a subject by name."""
    more = {"epochs": 5, "epoch_ratio": 1.0, "epoch_quartiles": [1.0, 1.0], "epoch_ms": 50.0, "ordinary_ms": 50.0}
    rows = []
    for subject in (run.reference, *(each for each in run.subjects if each != run.reference)):
        extra = more if run.part == "epochs" and subject.entry != FUSED else {}
        rows.append(made_up_row(subject.entry, subject.shapes, **{**extra, **changes.get(subject.entry, {})}))
    return {
        "part": run.part,
        "shapes": run.shapes,
        "parameters": 10_000_000,
        "largest_bytes": LARGEST_BYTES,
        **vars(run.settings),
        "busy_cores": 0.01,
        "rows": rows,
    }


def made_up_results(**changes: dict[str, Any]) -> dict[str, Any]:
    return {"about": ABOUT, "runs": [made_up_run(run, **changes) for run in wanted().runs()]}
