"""Training runs in processes of their own, several at once; finished ones are kept, and stopped ones continued."""

import signal
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from floragrad.cli.compare import worker
from floragrad.cli.disk import write_text
from floragrad.cli.errors import UserError
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.folder import CONFIG, RunFolder, new_folder
from floragrad.cli.train.run import begin


def run_all(runs: Mapping[Path, RunConfig], jobs: int) -> None:
    """Do the runs that are not finished, and print each one's result. Ctrl-C and SIGTERM stop them at a checkpoint.

    Args:
        runs: Configuration of each folder. One with ``prepared`` data reads those, another prepares its own.
        jobs: Processes at once; 0 does one after another in this one, whose peak of memory is that of all.

    Raises:
        UserError: A folder holds a run with other options, or a run has failed.
    """
    for path, config in runs.items():
        if not path.is_dir() and config.prepared is None:
            begin(config, path)
        elif not path.is_dir():
            with new_folder(path) as folder:
                write_text(folder / CONFIG, config.to_json())
        elif RunFolder.open(path).config != config:
            raise UserError(f"{path} holds a run with other options: move it away, or give another --out")
    left = [path for path in runs if RunFolder(path).summary() is None]
    if jobs == 0:
        for path in left:
            _checked(path, worker.main(path, path.name))
        return
    done = len(runs) - len(left)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    running: set[subprocess.Popen[bytes]] = set()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(train, path, running) for path in left]):
                path, done = future.result(), done + 1
                summary = RunFolder(path).summary()
                assert summary is not None
                print(f"{done}/{len(runs)} {path.name}: {worker.outcome(summary)}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.send_signal(signal.SIGINT)
            raise


def train(path: Path, running: "set[subprocess.Popen[bytes]]") -> Path:
    """Train the run in a folder to its end, in a session of its own: signals reach it through :func:`run_all`."""
    command = worker.command(path, path.name)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        running.add(process)
        code = process.wait()
        running.remove(process)
    return _checked(path, code)


def _checked(path: Path, code: int) -> Path:
    if code:
        raise UserError(f"the run {path} ended with exit code {code}: the same command continues it")
    return path
