"""Real processes and real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from floragrad.train.folder import METRICS, RunFolder
from tests.train.support import FAST, Here, command, fast_config, run, timeless

PATIENCE = 120.0
"""Seconds after which a test gives up; nothing is measured with it."""
STEPS = 40
"""Enough of them for a signal to come before the last one."""
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items() if name != "steps"]


def start(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "floragrad.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def wait_for_step(process: "subprocess.Popen[str]", out: Path, runs: str = ".") -> None:
    """Wait until a run in a folder, or one of those in it that match a pattern, has made a step.

    Nothing else below the folder is looked at: a run is prepared under another name, which may vanish any time.
    """
    deadline = time.monotonic() + PATIENCE
    while not any('"loss"' in file.read_text() for file in out.glob(f"{runs}/{METRICS}")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stopped_by_ctrl_c(out: Path, *arguments: object) -> RunFolder:
    """The folder of a run that was stopped after some of its steps."""
    process = start("train", "--steps", STEPS, "--out", out, *arguments, *OPTIONS)
    wait_for_step(process, out)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors == f"floragrad: stopped and saved; continue with: floragrad train --resume {out}\n"
    folder = RunFolder.open(out)
    step = folder.checkpoints()[-1][0]
    assert 0 < step < STEPS
    assert folder.metrics()[-1]["step"] == step
    return folder


def test_ctrl_c_saves_and_the_run_goes_on(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    folder = stopped_by_ctrl_c(out, "--text", texts)
    assert not folder.staging.exists()

    assert command("train", "--resume", out) == 0
    assert timeless(folder) == timeless(run(fast_config(texts, steps=STEPS), tmp_path / "whole"))


def test_ctrl_c_before_the_run_has_begun_leaves_nothing(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # reading it waits for us, so the run is still preparing
    process = start("train", "--text", pipe, "--out", tmp_path / "run", *OPTIONS)
    with open(pipe, "w", encoding="utf-8"):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors.strip() == "floragrad: stopped before there was anything to save"
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_comparison_goes_on_where_it_stopped(texts: Path, tmp_path: Path, here: Here) -> None:
    """The workers that are stopped are processes of their own."""
    out = tmp_path / "comparison"
    optimizers = ("--optimizers", "adamw,adafactor")
    process = start("compare", *optimizers, "--text", texts, "--steps", STEPS, "--out", out, *OPTIONS)
    wait_for_step(process, out, "runs/*")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors == f"floragrad: stopped and saved; continue with: floragrad compare --resume {out}\n"
    (stopped,) = (out / "runs").iterdir()
    step = RunFolder.open(stopped).checkpoints()[-1][0]
    assert 0 < step < STEPS
    assert command("compare", "--resume", out) == 0
    assert len(list((out / "runs").iterdir())) == 2
    assert (out / "table.md").is_file()
    one = run(fast_config(texts, optimizer="adamw", steps=STEPS), tmp_path / "whole")
    assert timeless(RunFolder.open(stopped)) == timeless(one)
