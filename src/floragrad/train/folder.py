"""The folder of a run: what lies where, and nothing in it half-written."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floragrad.train.config import RunConfig
from floragrad.train.errors import UserError

CONFIG, METRICS, SUMMARY, FIGURE = "config.json", "metrics.jsonl", "summary.json", "loss.png"
PLAN, CORPUS, STAGING = "comparison.json", "corpus", ".staging"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def write_text(path: Path, text: str) -> None:
    """Write a file under another name, then give it its own: it is there whole, or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _put_on_disk(*paths: Path) -> None:
    """Wait until files and the names in folders have been written; a power cut may take what comes after, not these."""
    if os.name != "posix":  # Windows opens no folders
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to prepare things in, which becomes ``out`` at the end; after an error nothing is left.

    Args:
        out: What it will be called. It may exist if it is empty.

    Raises:
        UserError: ``out`` holds something already, or cannot be made.
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
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
                folder.rmdir()
        raise


def check_free(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        UserError: It does.
    """
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
        """The run in ``path``.

        Raises:
            UserError: There is none.
        """
        if not (path / CONFIG).is_file():
            raise UserError(f"--resume {path} holds no run: give a folder that floragrad train has made")
        return cls(path)

    @property
    def config(self) -> RunConfig:
        """The configuration that the run was begun with."""
        return RunConfig.from_json((self.path / CONFIG).read_text(encoding="utf-8"))

    @property
    def corpus(self) -> Path:
        """Where the run's text and tokenizer lie."""
        shared = self.config.prepared
        return self.path / CORPUS if shared is None else self.path / shared

    @property
    def staging(self) -> Path:
        """Where checkpoints are written until they are whole."""
        return self.path / STAGING

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Step and folder of each checkpoint, oldest first."""
        matches = [(_CHECKPOINT.fullmatch(path.name), path) for path in self.path.iterdir()]
        return sorted((int(match[1]), path) for match, path in matches if match)

    def publish(self, step: int) -> None:
        """Move a checkpoint that is whole to its place, and remove the ones before it."""
        older = self.checkpoints()
        written = self.staging / f"checkpoint-{step}"
        _put_on_disk(*written.rglob("*"), written)
        written.replace(self.path / written.name)
        _put_on_disk(self.path)
        shutil.rmtree(self.staging)
        for _, path in older:
            shutil.rmtree(path)

    def drop_checkpoints(self) -> None:
        """Remove every checkpoint."""
        for _, path in self.checkpoints():
            shutil.rmtree(path)

    def rewind(self) -> int:
        """Go back to the newest checkpoint, and drop what came after it. Returns its step, or 0."""
        shutil.rmtree(self.staging, ignore_errors=True)
        saved = self.checkpoints()
        step = saved[-1][0] if saved else -1
        kept = [line for line in self.metrics() if line["step"] <= step]
        write_text(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        return max(step, 0)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the metrics. A last line that a crash has cut short is left out."""
        path = self.path / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the summary: the mark of a finished run."""
        write_text(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None before that."""
        path = self.path / SUMMARY
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from continuing the same run at the same time.

        Raises:
            UserError: Another process is at it.
        """
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
