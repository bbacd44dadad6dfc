"""Starting workers and asking them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from benchmarks.step.optimizers import ALL
from benchmarks.step.shapes import Spec

ROOT: Final = Path(__file__).resolve().parents[2]
PATIENCE: Final = 30
"""Seconds that a worker has to end by itself."""


class WorkerError(Exception):
    """A worker has failed; the message says how."""


class Worker:
    """A worker's process, seen from the one that measures.

    Idle, it waits for a line and uses no processor: OpenMP's threads go on spinning for up to 10 ms after an
    operation, and then sleep. ``OMP_WAIT_POLICY`` is left alone, since what it changes is the time of a step.

    Args:
        entry: A row of the table of optimizers.
        tensors: What it steps.
        dtype: Of parameters and gradients.
        threads: Of its operations.
    """

    def __init__(self, entry: str, tensors: Sequence[Spec], dtype: str, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._words = Path(self._folder.name) / "stderr"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            # An empty one: what a first step takes to compile is not to depend on earlier runs.
            "TORCHINDUCTOR_CACHE_DIR": str(Path(self._folder.name) / "inductor"),
            **ALL[entry].environment,
        }
        with self._words.open("w", encoding="utf-8") as words:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.step.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                cwd=ROOT,
                env=environment,
                text=True,
                encoding="utf-8",
            )
        listed = [(spec.name, spec.shape, spec.kind) for spec in tensors]
        self._about = json.dumps({"entry": entry, "tensors": listed, "dtype": dtype, "threads": threads})

    def begin(self) -> None:
        """Tell it what it is; it makes its optimizer while others do the same.

        Raises:
            WorkerError: It has ended already.
        """
        self._tell(self._about)

    def ready(self) -> None:
        """Wait until it can be asked.

        Raises:
            WorkerError: It could not make its optimizer.
        """
        self._answer()

    def step(self) -> float:
        """The seconds of one step.

        Raises:
            WorkerError: It failed, with its error's text; or it ended without one, with its last words.
        """
        self._tell("step")
        return float(self._answer()["seconds"])

    def examine(self) -> tuple[int, int | None]:
        """Bytes of its state, and those that one more step takes on top at its peak, where that can be seen.

        Raises:
            WorkerError: As in :meth:`step`.
        """
        self._tell("examine")
        answer = self._answer()
        return answer["state_bytes"], answer["peak_bytes"]

    def dismiss(self) -> None:
        """Let it end, without waiting."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it may have ended before
            self._process.stdin.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdout is not None
        self.dismiss()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(self._ending()) from error

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._ending())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(_without_places(answer["error"]))
        return answer

    def _ending(self) -> str:
        """How the process ended, and the last line that it wrote."""
        code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        last = self._words.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        return f"the process ended with {how}: {_without_places(last)}" if last else f"the process ended with {how}"


def _without_places(text: str) -> str:
    """An error's text without where this machine keeps things: results are for others to read."""
    for place in (sys.prefix, sys.base_prefix, str(ROOT), tempfile.gettempdir()):
        text = text.replace(place, "…")
    return text
