"""Real processes and real signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from rich.console import Console

from floragrad import cli
from floragrad.cli.compare import compare as comparison
from floragrad.cli.compare.compare import begin, compare
from floragrad.cli.compare.plan import Plan
from floragrad.cli.errors import StoppedError
from floragrad.cli.train.folder import METRICS, RunFolder
from floragrad.cli.train.interrupt import StopRequest
from tests.cli.train.support import FAST, Here, command, fast_config, run, timeless

PATIENCE = 120.0
"""Seconds after which a test gives up; nothing is measured with it."""
STEPS = 40
"""Enough of them for a signal to come before the last one."""
LONG = {**FAST, "steps": STEPS, "eval_every": STEPS, "save_every": STEPS}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in LONG.items() if name != "steps"]


def start(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "floragrad", *map(str, arguments)],
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
    assert timeless(folder) == timeless(run(fast_config(texts, **LONG), tmp_path / "whole"))


def test_ctrl_c_before_the_run_has_begun_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real signal, but to this process."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # reading it waits for us, so the run is still preparing
    done = threading.Event()

    def interrupt() -> None:
        with open(pipe, "w", encoding="utf-8"):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            done.wait(PATIENCE)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    code = command("train", "--text", pipe, "--out", tmp_path / "run", *OPTIONS)
    done.set()
    thread.join(PATIENCE)
    assert code == 130
    assert capsys.readouterr().err.strip() == "floragrad: stopped before there was anything to save"
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_stopped(texts: Path, tmp_path: Path, here: Here) -> None:
    """The workers that are stopped are processes of their own."""
    out = tmp_path / "comparison"
    methods = ("--methods", "adamw,adafactor")
    process = start("compare", *methods, "--text", texts, "--steps", STEPS, "--out", out, *OPTIONS)
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
    one = run(fast_config(texts, **LONG, optimizer="adamw"), tmp_path / "whole")
    assert timeless(RunFolder.open(stopped)) == timeless(one)


def in_every_place(function: Callable[[], None], code: Any) -> int:
    """Call ``function`` again and again, with SIGINT before the first, second, … instruction of ``code``.

    Returns:
        How many places there were.
    """
    place = 0
    while True:
        seen = 0

        def trace(frame: FrameType, event: str, _argument: object, place: int = place) -> Any:
            nonlocal seen
            if frame.f_code is not code:
                return trace
            frame.f_trace_opcodes = True
            if event == "opcode":
                if seen == place:
                    signal.raise_signal(signal.SIGINT)
                seen += 1
            return trace

        sys.settrace(trace)
        try:
            function()
        finally:
            sys.settrace(None)
        if seen <= place:
            return place
        place += 1


@pytest.mark.parametrize("method", [StopRequest.forwarding.__wrapped__, StopRequest._deliver])
def test_a_signal_is_forwarded_once_wherever_it_comes(method: Callable[..., object]) -> None:
    def start_and_wait() -> None:
        stop, forwarded = StopRequest(), []
        with stop.listening():
            with stop.forwarding(forwarded.append):
                sent = stop.signum is not None
            # One that comes when the worker is left may reach it or not.
            assert forwarded == [signal.SIGINT] if sent else forwarded in ([], [signal.SIGINT])

    assert in_every_place(start_and_wait, method.__code__) > 5


class _Worker:
    """Stands for a worker's process: it ends with 130 where it was told to, and with 0 otherwise."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.send_signal = self.signals.append

    def wait(self) -> int:
        return 128 + self.signals[0] if self.signals else 0


def a_comparison(texts: Path, out: Path) -> Path:
    options = {**FAST, "steps": 2, "text": (str(texts),), "keep_checkpoint": False}
    begin(Plan(methods=("adamw",), options=options, command="floragrad compare"), out)
    return out


def test_ctrl_c_while_a_worker_is_started_reaches_it(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = []

    def popen(*_arguments: object, **_options: object) -> _Worker:
        workers.append(_Worker())
        signal.raise_signal(signal.SIGINT)
        return workers[-1]

    monkeypatch.setattr(comparison.subprocess, "Popen", popen)
    with pytest.raises(StoppedError, match="floragrad compare --resume"):
        compare(a_comparison(texts, tmp_path / "out"), Console(quiet=True))
    assert [worker.signals for worker in workers] == [[signal.SIGINT]]


@pytest.mark.slow
def test_a_starting_worker_says_nothing_and_saves(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started = subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> "subprocess.Popen[bytes]":
        process = started(*arguments, **options)
        signal.raise_signal(signal.SIGINT)  # long before the worker has imported anything
        return process

    monkeypatch.setattr(comparison.subprocess, "Popen", popen)
    out = a_comparison(texts, tmp_path / "out")
    with pytest.raises(StoppedError):
        compare(out, Console(quiet=True))
    assert capfd.readouterr().err == ""
    (stopped,) = (out / "runs").iterdir()
    assert [step for step, _ in RunFolder.open(stopped).checkpoints()] == [1]


def test_a_second_ctrl_c_ends_a_comparison_that_can_be_continued(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison._Runner, "_train", interrupted)
    with pytest.raises(StoppedError, match="floragrad compare --resume") as caught:
        compare(a_comparison(texts, tmp_path / "out"), Console(quiet=True))
    assert caught.value.exit_code == 130


def test_ctrl_c_while_libraries_are_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "require", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "floragrad: stopped before there was anything to save\n"
