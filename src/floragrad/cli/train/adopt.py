"""Write the manifests of a run, or of a comparison, that an older version has made: its files are taken as they are.

``python -m floragrad.cli.train.adopt RUN``
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from floragrad.cli.disk import read_object
from floragrad.cli.errors import UserError
from floragrad.cli.train import manifest
from floragrad.cli.train.folder import CONFIG, CORPUS, METRICS, PLAN, RUNS, SUMMARY, RunFolder


def adopt(path: Path) -> None:
    """Write the manifests that are missing below a run's or a comparison's folder, and nothing else."""
    if (path / PLAN).is_file():
        _list(path, [path / PLAN])
        for run in (path / RUNS).iterdir():
            adopt(run)
    else:
        _adopt_run(RunFolder(path))
    if (path / CORPUS).is_dir():
        _list(path / CORPUS, (path / CORPUS).rglob("*"))


def _adopt_run(run: RunFolder) -> None:
    if not (run.path / CONFIG).is_file():
        raise UserError(f"{run.path} holds no run and no comparison: give a folder that floragrad has made")
    _ = run.config  # a model's config.json makes no run
    _list(run.path, [run.path / CONFIG])
    lines = run.metrics()
    for step, checkpoint in run.checkpoints():
        length = sum(len(json.dumps(line)) + 1 for line in lines if line["step"] <= step)
        _list(checkpoint, checkpoint.rglob("*"), step=step, metrics=manifest.digest(run.path / METRICS, length))
    if (run.path / SUMMARY).is_file():
        summary = read_object(run.path / SUMMARY)
        if "sha256" not in summary:
            run.write_summary(summary)


def _list(folder: Path, paths: Iterable[Path], **facts: Any) -> None:
    if not (folder / manifest.MANIFEST).exists():
        manifest.write(folder, paths, **facts)


if __name__ == "__main__":
    try:
        adopt(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"floragrad: {error}")
