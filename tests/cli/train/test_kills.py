"""Runs that are killed at any file operation, or at any moment, and go on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from floragrad.cli.train.folder import RunFolder
from tests.cli.train.kill_session import EVERY, MOMENTS, OPERATIONS
from tests.cli.train.support import assert_same_run, read_json, timeless

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_killed_run_loses_at_most_one_interval_and_ends_as_the_whole_one(texts: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.cli.train.kill_session", str(texts), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lost = read_json(tmp_path / "lost.json")
    assert len(lost) == OPERATIONS + MOMENTS
    assert all(0 <= steps <= EVERY for steps in lost.values()), lost
    assert any(lost.values())
    for name in lost:
        folder, keep = RunFolder.open(tmp_path / name), name.rpartition("-")[2]
        whole = RunFolder(tmp_path / f"whole-{keep}")
        if keep == "kept":
            assert_same_run(folder, whole)
        else:
            assert timeless(folder) == timeless(whole)
        summary, expected = folder.summary(), whole.summary()
        assert summary is not None
        assert expected is not None
        assert summary["validation_loss"] == expected["validation_loss"]
