import json
import os
from pathlib import Path

import pytest

from floragrad.cli.disk import write_text
from floragrad.cli.errors import UserError
from floragrad.cli.train import manifest
from floragrad.cli.train.folder import RunFolder, check_free, new_folder
from tests.cli.train.support import fast_config, tree


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run's folder with nothing in it but its configuration."""
    with new_folder(tmp_path / "run") as made:
        write_text(made / "config.json", fast_config(tmp_path).to_json())
    return RunFolder.open(tmp_path / "run")


def publish(folder: RunFolder, step: int) -> None:
    """Save a checkpoint of one file."""
    written = folder.staging / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "weights").write_text(str(step))
    folder.publish(step)


def write_metrics(folder: RunFolder, *steps: int, rest: str = "") -> None:
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps)
    (folder.path / "metrics.jsonl").write_text(lines + rest)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "down"
    with new_folder(out) as made:
        (made / "file").write_text("text")
        assert not out.exists()
    assert tree(tmp_path) == ["deep", "deep/down", "deep/down/file", "deep/down/manifest.json"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    with new_folder(tmp_path) as made:
        (made / "file").write_text("text")
    assert tree(tmp_path) == ["file", "manifest.json"]


def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "deep" / "down") as made:
            (made / "file").write_text("text")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "holds another run: continue that one with floragrad train --resume"),
        ("comparison.json", "holds another run: continue that one with floragrad compare --resume"),
        ("novel.txt", "is not empty: give the name of a new folder"),
    ],
)
def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        check_free(tmp_path)
    assert tree(tmp_path) == [name]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="is a file: give the name of a new folder"):
        check_free(tmp_path / "file")


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with (
        pytest.raises(UserError, match=r"cannot be made \(.*\): give a folder you may write to"),
        new_folder(tmp_path / "file" / "run"),
    ):
        pass


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run: give a folder that floragrad train has made"):
        RunFolder.open(tmp_path)


def test_a_checkpoint_replaces_the_ones_before_it(folder: RunFolder) -> None:
    for step in (5, 10, 100):
        publish(folder, step)
        assert folder.checkpoints() == [(step, folder.path / f"checkpoint-{step}")]
        assert not folder.staging.exists()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its name is before the older checkpoint goes."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        found.append((path.name, tuple(step for step, _ in folder.checkpoints())))

    (folder.path / "checkpoint-5").mkdir()
    (folder.staging / "checkpoint-10" / "part").mkdir(parents=True)
    (folder.staging / "checkpoint-10" / "part" / "weights").write_text("1")
    monkeypatch.setattr(os, "fsync", fsync)
    folder.publish(10)
    *contents, last = found
    assert {("checkpoint-10", (5,)), ("part", (5,)), ("weights", (5,)), ("manifest.json", (5,))} <= set(contents)
    assert ("metrics.jsonl", (5,)) in contents, "its first bytes are part of the checkpoint"
    assert {steps for _, steps in contents} == {(5,)}
    assert last == (folder.path.name, (5, 10))
    assert [step for step, _ in folder.checkpoints()] == [10]


def test_going_back_drops_what_came_after_the_checkpoint(folder: RunFolder) -> None:
    folder.corpus.mkdir()
    manifest.write(folder.corpus, [])
    write_metrics(folder, 0, *range(1, 11), 10)
    publish(folder, 10)
    (folder.path / "checkpoint-9").mkdir()
    (folder.staging / "checkpoint-20").mkdir(parents=True)
    write_metrics(folder, 0, *range(1, 11), 10, *range(11, 20), rest='{"step": 20, "lo')
    assert folder.rewind() == 10
    assert [line["step"] for line in folder.metrics()] == [0, *range(1, 11), 10]
    assert not folder.staging.exists()


def test_going_back_without_a_checkpoint_starts_over(folder: RunFolder) -> None:
    folder.corpus.mkdir()
    manifest.write(folder.corpus, [])
    write_metrics(folder, 0, 1, 2)
    assert folder.rewind() == 0
    assert folder.metrics() == []


def test_a_file_is_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \udc80")
    assert path.read_text() == "old"


def test_a_run_is_trained_by_one_process_at_a_time(folder: RunFolder) -> None:
    with folder.locked(), pytest.raises(UserError, match="is being trained by another process"), folder.locked():
        pass
    with folder.locked():
        pass
    assert tree(folder.path) == ["config.json", "manifest.json"]
