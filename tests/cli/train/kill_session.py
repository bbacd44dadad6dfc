"""Kill runs at their file operations and at random moments, then let them go on: one process that forks.

Its arguments are the folder of texts and the folder of the runs, where it leaves ``whole-*`` and the killed ones.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from floragrad.cli.train import trainer  # noqa: F401  # imported once, before the forks
from floragrad.cli.train.folder import METRICS, RunFolder
from floragrad.cli.train.run import begin, train
from tests.cli.train.support import fast_config, quiet

EVERY = 2
OPERATIONS, MOMENTS = 44, 20
WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


def forked(action: Callable[[], Any]) -> int:
    """Do something in a process of its own. Returns how that ended, as ``waitpid`` says it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def trained(path: Path, kill_at: int | None = None, counted: Path | None = None) -> None:
    """Train a run, killed before a file operation below its folder; with ``counted``, write how many there are."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and str(path) in str(arguments[0]):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train(RunFolder.open(path), quiet())
    if counted is not None:
        counted.write_text(str(count))


def alarmed(path: Path, seconds: float) -> None:
    """Train a run that the system ends at a moment, wherever it is."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    train(RunFolder.open(path), quiet())


def main(texts: Path, out: Path) -> None:
    """Make the whole runs, then the killed ones."""
    generator = random.Random(17)
    configs = {
        keep: fast_config(texts, save_every=EVERY, eval_every=3, keep_checkpoint=keep == "kept")
        for keep in ("kept", "dropped")
    }
    counts = {}
    for keep, config in configs.items():
        begin(config, out / f"whole-{keep}")
        counted = out / f"count-{keep}"
        assert forked(lambda: trained(out / f"whole-{keep}", counted=counted)) == 0  # noqa: B023  # called at once
        counts[keep] = int(counted.read_text())
    lost = {}
    for number in range(OPERATIONS + MOMENTS):
        keep = ("kept", "dropped")[number % 2]
        path = begin(configs[keep], out / f"killed-{number:02d}-{keep}").path
        if number < OPERATIONS:
            at = 1 + (number // 2) * (counts[keep] - 1) // (OPERATIONS // 2 - 1)
            ended = forked(lambda: trained(path, kill_at=at))  # noqa: B023
            assert os.WTERMSIG(ended) == signal.SIGKILL, ended
        else:
            seconds = generator.uniform(0.05, 1.5)
            ended = forked(lambda: alarmed(path, seconds))  # noqa: B023
            assert ended == 0 or os.WTERMSIG(ended) == signal.SIGALRM, ended
        lines = (path / METRICS).read_text().count('"loss"') if (path / METRICS).exists() else 0
        saved = max((step for step, _ in RunFolder(path).checkpoints()), default=0)
        finished = RunFolder(path).summary() is not None
        lost[path.name] = 0 if finished else lines - saved
        assert finished or forked(lambda: trained(path)) == 0  # noqa: B023
    (out / "lost.json").write_text(json.dumps(lost))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
