"""The benchmark for GPUs runs to its end without one, so that it cannot be broken when there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_every_section_runs_in_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--out", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    made = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    page = (tmp_path / "gpu.md").read_text()
    assert page.endswith("All checks passed.\n")
    assert "(triton)" in page
    assert "floragrad Flora, int4, ratio 2 | not run" not in page


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--out", str(tmp_path), "--only", "steps"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert "--only steps: choose from cases, resume, step, fold, peak, nccl" in made.stderr
