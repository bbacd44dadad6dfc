"""What a run says, and keeps, where its folder cannot be written or a process is killed."""

import contextlib
import errno
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from floragrad.cli.compare.compare import begin as begin_comparison
from floragrad.cli.compare.compare import compare
from floragrad.cli.compare.plan import Plan
from floragrad.cli.disk import refusal, whole_file
from floragrad.cli.errors import StoppedError, StorageError, UserError
from floragrad.cli.train import folder as folders
from floragrad.cli.train import manifest
from floragrad.cli.train.folder import RunFolder, new_folder
from floragrad.cli.train.run import begin, train
from tests.cli.train.support import FAST, Here, Meddler, assert_same_run, command, fast_config, quiet, run, tree

pytestmark = pytest.mark.usefixtures("one_layer")


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(fast_config(texts, optimizer="adamw"), tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def pristine(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after the fourth of eight steps."""
    folder = begin(fast_config(texts, optimizer="adamw"), tmp_path_factory.mktemp("stopped") / "run")
    with pytest.raises(StoppedError):
        train(folder, Meddler(3, signal.SIGINT))
    return folder.path


@pytest.fixture
def stopped(pristine: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(pristine, tmp_path / "run")))


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """What ``ulimit -f`` sets; Python ignores the signal, so that writing fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def sizes(folder: RunFolder) -> dict[str, int]:
    (_, checkpoint), *_ = folder.checkpoints()
    return {path.name: path.stat().st_size for path in checkpoint.iterdir()}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_limit_on_files_is_one_line_and_loses_nothing(
    stopped: RunFolder, whole: RunFolder, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    """Rust writes the one and names the system's error; C++ writes the other, which is larger, and names none."""
    found = sizes(stopped)
    assert found["model.safetensors"] < found["optimizer.pt"]
    below = max((size for size in found.values() if size < found[file]), default=0)
    capsys.readouterr()
    with file_size_limit((below + found[file]) // 2):
        assert command("train", "--resume", stopped.path) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "model shards" not in line]
    assert lines == [
        f"floragrad: {stopped.path} cannot be written (File too large): make that possible, then --resume it: it "
        "goes on from checkpoint-4"
    ]
    assert not stopped.staging.exists()
    assert manifest.fault(stopped.path / "checkpoint-4") is None
    if file == "optimizer.pt":
        train(RunFolder.open(stopped.path), quiet())
        assert_same_run(stopped, whole)


def test_a_full_disk_is_one_line(stopped: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """The metrics lie on a device that is always full."""
    (stopped.path / "checkpoint-4").rename(stopped.path.parent / "checkpoint-4")
    (stopped.path / "metrics.jsonl").unlink()
    with pytest.raises(StorageError) as caught:
        train(stopped, Filler(stopped.path / "metrics.jsonl"))
    assert str(caught.value) == (
        f"{stopped.path} cannot be written (No space left on device): make that possible, then --resume it: it goes "
        "on from the beginning, for there is no other checkpoint that is whole"
    )


class Filler(Meddler):
    """Fills the disk, for one file, before the first step."""

    def __init__(self, path: Path) -> None:
        super().__init__(0, None)
        self._path = path

    def evaluation(self, *_: Any) -> None:
        self._path.unlink(missing_ok=True)
        self._path.symlink_to("/dev/full")


def test_a_folder_that_may_not_be_written_is_one_line(
    stopped: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may write everywhere, so that the system's answer is given in its place."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "truncate", refuse)
    before = tree(stopped.path)
    assert command("train", "--resume", stopped.path) == 2
    assert capsys.readouterr().err == (
        f"floragrad: {stopped.path} cannot be written (Read-only file system): make that possible, then --resume it: "
        "it goes on from checkpoint-4\n"
    )
    assert tree(stopped.path) == before


def test_a_new_run_that_finds_no_room_leaves_nothing(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]
    with file_size_limit(1000):
        assert command("train", "--text", texts, "--out", tmp_path / "deep" / "run", *fast) == 2
    assert capsys.readouterr().err == (
        f"floragrad: --out {tmp_path / 'deep' / 'run'} cannot be written (File too large): make room, or give another "
        "folder\n"
    )
    assert tree(tmp_path) == []


def test_an_error_of_another_kind_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    assert refusal(RuntimeError("a fault"), tmp_path) is None
    assert refusal(ValueError("Failed to write: File too large [os_error_code='27']"), tmp_path) == "File too large"
    assert tree(tmp_path) == []


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with file_size_limit(10), pytest.raises(OSError, match="File too large"), whole_file(path) as temporary:
        temporary.write_text("new" * 10)
    assert (path.read_text(), tree(tmp_path)) == ("old", ["file"])


@pytest.mark.parametrize("keep", [True, False])
def test_the_summary_comes_before_the_checkpoint_goes(
    texts: Path, tmp_path: Path, whole: RunFolder, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    """A kill between the two loses nothing, and what is left behind goes with the next look."""
    folder = begin(fast_config(texts, keep_checkpoint=keep, save_every=4), tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_summary", _die)
        with pytest.raises(KeyboardInterrupt):
            train(folder, quiet())
    assert [step for step, _ in folder.checkpoints()] == [8]
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "tidy", _die)
        with pytest.raises(KeyboardInterrupt):
            train(folder, quiet())
    assert [step for step, _ in folder.checkpoints()] == [8]
    (folder.path / ".staging" / "checkpoint-9").mkdir(parents=True)
    assert command("train", "--resume", folder.path) == 0
    assert [step for step, _ in folder.checkpoints()] == ([8] if keep else [])
    assert not folder.staging.exists()


def _die(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_comparison_goes_on_after_a_kill_at_the_end_of_a_run(
    texts: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runs keep no checkpoints by default."""
    options = {**FAST, "steps": 4, "keep_checkpoint": False, "text": (str(texts),)}
    made = Plan(methods=("adamw",), options=options, command="floragrad compare")
    out = tmp_path / "out"
    begin_comparison(made, out)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_summary", _die)
        with pytest.raises(StoppedError, match="floragrad compare --resume"):
            compare(out, Console(quiet=True))
    (path,) = (out / "runs").iterdir()
    assert RunFolder(path).checkpoints()[-1][0] == 4
    assert RunFolder(path).metrics()[-1]["step"] == 4
    compare(out, Console(quiet=True))
    assert (out / "table.md").is_file()
    assert RunFolder(path).checkpoints() == []


def test_nothing_is_left_of_what_is_written_on_the_way(stopped: RunFolder, whole: RunFolder) -> None:
    train(stopped, quiet())
    assert not stopped.staging.exists()
    (stopped.path / "summary.json").unlink()
    train(stopped, quiet())  # nothing left to do but to write it
    assert not stopped.staging.exists()
    assert_same_run(stopped, whole)


def test_two_new_runs_cannot_have_one_folder(tmp_path: Path) -> None:
    """The other one was faster."""
    out = tmp_path / "run"

    def slower() -> None:
        with new_folder(out) as made, new_folder(out) as other:
            (made / "mine").write_text("1")
            (other / "config.json").write_text("2")

    with pytest.raises(UserError, match="holds another run: continue that one"):
        slower()
    assert tree(tmp_path) == ["run", "run/config.json", "run/manifest.json"]
    assert manifest.fault(out) is None


def test_a_name_is_not_chosen_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in the second in which another process prepares a run of that name."""
    from floragrad.cli.train.command import new_name

    monkeypatch.chdir(tmp_path)
    names: list[Any] = []
    with contextlib.ExitStack() as held:
        for _ in range(3):
            names.append(new_name("tiny"))
            held.enter_context(new_folder(names[-1]))
    assert len(set(names)) == 3


def test_removing_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    folders.remove(tmp_path / "link")
    assert tree(tmp_path) == ["there"]
