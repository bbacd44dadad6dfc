"""The folder of a run: its files, none of them half-written."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floragrad.cli import disk
from floragrad.cli.disk import put_on_disk, read_object, remove, write_text
from floragrad.cli.errors import StorageError, UserError
from floragrad.cli.train import manifest
from floragrad.cli.train.config import RunConfig

CONFIG, METRICS, SUMMARY, FIGURE = "config.json", "metrics.jsonl", "summary.json", "loss.png"
PLAN, RUNS, CORPUS, STAGING = "comparison.json", "runs", "corpus", ".staging"
RESTORE = "put it back from a copy, or begin a new run"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to prepare things in, which becomes ``out`` at the end; after an error nothing is left.

    The files that lie in it then are listed in its manifest. ``out`` may exist if it is empty.
    """
    check_free(out)
    made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}): give a folder you may write to") from error
    try:
        yield temporary
        manifest.write(temporary, temporary.iterdir())
        temporary.chmod(0o755)  # mkdtemp makes it private
        put_on_disk(*temporary.rglob("*"), temporary)
        try:
            temporary.replace(out)
        except OSError:
            check_free(out)  # another process may have been faster
            raise
        put_on_disk(out.parent)
    except BaseException as error:
        known = isinstance(error, UserError) or not isinstance(error, Exception)
        reason = None if known else disk.refusal(error, temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
                folder.rmdir()
        if reason is not None:
            raise UserError(f"--out {out} cannot be written ({reason}): make room, or give another folder") from error
        raise


def check_free(out: Path) -> None:
    """Refuse a folder that holds something."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give the name of a new folder")
    for name, command in ((CONFIG, "train"), (PLAN, "compare")):
        if (out / name).is_file():
            raise UserError(
                f"--out {out} holds another run: continue that one with floragrad {command} --resume {out}, or "
                "give the name of a new folder"
            )
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: give the name of a new folder")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder that exists: its files, and the newest checkpoint."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Return the run in ``path``; refuse a folder without one, or with a damaged configuration."""
        whole = path.resolve()
        if _CHECKPOINT.fullmatch(whole.name) and (whole.parent / CONFIG).is_file():
            raise UserError(
                f"--resume {path} is a checkpoint, and a run goes on from its newest one: give the run's folder, "
                f"--resume {path.parent}"
            )
        if not (path / CONFIG).is_file():
            raise UserError(f"--resume {path} holds no run: give a folder that floragrad train has made")
        run = cls(path)
        if not (path / manifest.MANIFEST).exists():
            _ = run.config  # another folder with a config.json is no run
        manifest.check(path, RESTORE)
        return run

    @property
    def config(self) -> RunConfig:
        """The configuration that the run was begun with."""
        return RunConfig.from_json((self.path / CONFIG).read_text(encoding="utf-8", errors="replace"))

    @property
    def corpus(self) -> Path:
        """Folder of the run's text and tokenizer."""
        shared = self.config.prepared
        return self.path / CORPUS if shared is None else self.path / shared

    @property
    def staging(self) -> Path:
        """Folder in which checkpoints are written until they are whole."""
        return self.path / STAGING

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Step and folder of each checkpoint, oldest first."""
        matches = [(_CHECKPOINT.fullmatch(path.name), path) for path in self.path.iterdir()]
        return sorted((int(match[1]), path) for match, path in matches if match)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Report in one line, as a StorageError, that the folder could not be written, and its content."""
        try:
            yield
        except Exception as error:
            reason = None if isinstance(error, UserError) else disk.refusal(error, self.path)
            if reason is None:
                raise
            raise StorageError(
                f"{self.path} cannot be written ({reason}): make that possible, then --resume it: it goes on "
                f"{_place(self._newest_whole())}"
            ) from error

    def publish(self, step: int) -> None:
        """Move a checkpoint that is complete to its place with its manifest, and remove the ones before it."""
        with self.writing():
            written = self.staging / f"checkpoint-{step}"
            manifest.write(written, written.rglob("*"), step=step, metrics=self._metrics_digest())
            put_on_disk(*written.rglob("*"), written)
            written.replace(self.path / written.name)
            put_on_disk(self.path)
            remove(self.staging)
            for number, path in self.checkpoints():
                if number < step:
                    remove(path)

    def tidy(self, checkpoints: bool) -> None:
        """Remove unfinished files, and every checkpoint where they are not to be kept."""
        with self.writing():
            for path in (self.staging, *(path for _, path in self.checkpoints() if not checkpoints)):
                remove(path)

    def rewind(self) -> int:
        """Go back to the newest checkpoint, and drop everything after it. Returns its step, or 0.

        A damaged checkpoint, text or file of metrics is refused.
        """
        manifest.check(self.corpus, RESTORE)
        saved = self.checkpoints()
        step, kept = 0, 0
        if saved:
            step, newest = saved[-1]
            found = self._fault(step, newest)
            if found is not None:
                raise UserError(
                    f"{found}: put it back from a copy, or move {newest} away, and --resume goes on "
                    f"{_place(self._newest_whole(below=step))}"
                )
            kept = manifest.read(newest)["metrics"]["bytes"]
        with self.writing():
            remove(self.staging)
            if (self.path / METRICS).exists():
                os.truncate(self.path / METRICS, kept)
        return step

    def _fault(self, step: int, checkpoint: Path) -> str | None:
        """Describe the damage of a checkpoint, or of the metrics up to it."""
        found = manifest.fault(checkpoint)
        if found is not None:
            return f"{checkpoint} is damaged: {found}"
        facts = manifest.read(checkpoint)
        if facts.get("step") != step:
            return f"{checkpoint} is not what it is called: it was saved after step {facts.get('step')}"
        return self._metrics_fault(facts.get("metrics"), f"{checkpoint.name} was saved")

    def _metrics_fault(self, wanted: Any, when: str) -> str | None:
        """Describe how the metrics differ from those that were measured."""
        size = wanted.get("bytes") if isinstance(wanted, dict) else None
        path = self.path / METRICS
        found = manifest.digest(path, size) if path.is_file() else None
        if found is not None and found == wanted:
            return None
        return f"{path} is damaged: it does not begin with the {size} bytes that {when} with"

    def _metrics_digest(self) -> dict[str, Any]:
        """Size and SHA-256 of the metrics, which are on the disk then."""
        path = self.path / METRICS
        path.touch()
        put_on_disk(path)
        return manifest.digest(path)

    def _newest_whole(self, below: int | None = None) -> Path | None:
        """Return the newest checkpoint that a run can go on from."""
        older = [each for each in self.checkpoints() if below is None or each[0] < below]
        return next((path for step, path in reversed(older) if self._fault(step, path) is None), None)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of the metrics, but for a last one that a crash has cut short; refuse damaged ones."""
        path = self.path / METRICS
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        return [_metric(path, number, line) for number, line in enumerate(text.split("\n")[:-1], 1)]

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a line to the metrics."""
        with self.writing(), open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the summary: the mark of a finished run."""
        with self.writing():
            whole = {**summary, "metrics": self._metrics_digest()}
            text = json.dumps({**whole, "sha256": _seal(whole)}, indent=2) + "\n"
            write_text(self.path / SUMMARY, text)

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of a finished run; None before that. A damaged one, or damaged metrics, is refused."""
        path = self.path / SUMMARY
        if not path.is_file():
            return None
        try:
            whole = read_object(path)
            if whole.pop("sha256", None) != _seal(whole):
                raise ValueError("its SHA-256 is another")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({error}): put it back from a copy, or move it away, and --resume goes on "
                f"{_place(self._newest_whole())}"
            ) from error
        found = self._metrics_fault(whole.pop("metrics"), "the run ended")
        if found is not None:
            raise UserError(f"{found}: {RESTORE}")
        return whole

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from continuing the same run at the same time; refuse to be the second one."""
        if os.name != "posix":  # Windows cannot lock a folder; there it goes unguarded
            yield
            return
        import fcntl

        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise UserError(f"{self.path} is being trained by another process: wait for it to end") from error
        finally:
            os.close(descriptor)


def _place(checkpoint: Path | None) -> str:
    """Describe the position from which a run continues."""
    if checkpoint is None:
        return "from the beginning, for there is no other checkpoint that is whole"
    return f"from {checkpoint.name}"


def _metric(path: Path, number: int, line: str) -> dict[str, Any]:
    """One line of the metrics."""
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise UserError(f"{path} is damaged: line {number} is no object with a step: {RESTORE}")
    return values


def _seal(summary: dict[str, Any]) -> str:
    """Return the SHA-256 of a summary's values."""
    return hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()
