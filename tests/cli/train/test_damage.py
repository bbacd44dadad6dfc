"""What a run's folder holds is compared with its manifests before anything is loaded."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from floragrad.cli.errors import StoppedError
from floragrad.cli.train import adopt, manifest
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.run import begin, train
from tests.cli.train.support import Meddler, assert_same_run, command, fast_config, quiet, refused, run

pytestmark = pytest.mark.usefixtures("one_layer")

GENERIC = "put it back from a copy, or begin a new run"


@pytest.fixture(scope="module")
def pristine(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that was stopped after the sixth, and still has the checkpoint of the fourth."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    folder = begin(fast_config(texts, eval_every=3), path)
    for step in (4, 6):
        with pytest.raises(StoppedError):
            train(folder, Meddler(step - 1, signal.SIGINT))
        if step == 4:
            shutil.copytree(path / "checkpoint-4", path.parent / "checkpoint-4")
    (path.parent / "checkpoint-4").rename(path / "checkpoint-4")
    return path


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same run without a stop."""
    return run(fast_config(texts, eval_every=3), tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def stopped(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Leave out the second half."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """Leave nothing of it."""
    os.truncate(path, 0)


DAMAGES = {
    flip: "has other bytes than were written (SHA-256)",
    cut: "instead of",
    empty: "has 0 bytes instead of",
    Path.unlink: "is missing",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_no_file_of_a_run_may_be_damaged(
    stopped: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    """Of the checkpoint, of the text and its tokenizer, and the configuration: each in turn."""
    files = [path for path in sorted(stopped.rglob("*")) if path.is_file() and path.parent.name != "checkpoint-4"]
    assert {"optimizer.pt", "model.safetensors", "scheduler.pt", "trainer_state.json", "train.bin", "corpus.json"} < {
        path.name for path in files
    }
    for path in files:
        if path.name in (manifest.MANIFEST, "metrics.jsonl") or path == stopped / "config.json":
            continue
        before = path.read_bytes()
        damage(path)
        said = refused(capsys, "train", "--resume", stopped)
        where = path.parent if path.parent.name == "checkpoint-6" else stopped / "corpus"
        assert said.startswith(
            f"{where} is damaged: {path.relative_to(where)} {'' if damage is cut else DAMAGES[damage]}"
        )
        assert DAMAGES[damage] in said
        remedy = GENERIC if where.name == "corpus" else f"move {where} away, and --resume goes on from checkpoint-4"
        assert said.endswith(remedy)
        path.write_bytes(before)
    assert manifest.fault(stopped / "checkpoint-6") is None


@pytest.mark.parametrize("damage", [flip, cut, empty], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("where", [".", "corpus", "checkpoint-6"])
def test_a_manifest_may_not_be_damaged(
    stopped: Path, capsys: pytest.CaptureFixture[str], where: str, damage: Callable[[Path], None]
) -> None:
    damage(stopped / where / manifest.MANIFEST)
    assert refused(capsys, "train", "--resume", stopped).startswith(f"{stopped / where} is damaged: ")


@pytest.mark.parametrize("damage", [flip, cut, empty], ids=lambda damage: damage.__name__)
def test_the_configuration_may_not_be_damaged(
    stopped: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    damage(stopped / "config.json")
    said = refused(capsys, "train", "--resume", stopped)
    assert said.startswith(f"{stopped} is damaged: config.json has ")
    assert said.endswith(GENERIC)


def lines_lost(path: Path) -> None:
    """Leave out the second line and the third."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[3:]))


def garbage(path: Path) -> None:
    """Write something else into the third line."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "garbage\n", *lines[3:]]))


@pytest.mark.parametrize(
    "damage", [lines_lost, garbage, flip, cut, empty, Path.unlink], ids=lambda damage: damage.__name__
)
def test_the_metrics_up_to_the_checkpoint_may_not_be_damaged(
    stopped: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    path = stopped / "metrics.jsonl"
    size = path.stat().st_size
    damage(path)
    said = refused(capsys, "train", "--resume", stopped)
    assert said.startswith(
        f"{path} is damaged: it does not begin with the {size} bytes that checkpoint-6 was saved with: "
    )


@pytest.mark.parametrize("rest", ["garbage\n", '{"step": 7, "lo', "\0\0\0", '{"step": 5}\n[]\n'])
def test_metrics_after_the_checkpoint_do_not_matter(stopped: Path, whole: RunFolder, rest: str) -> None:
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write(rest)
    assert RunFolder(stopped).rewind() == 6
    assert (stopped / "metrics.jsonl").read_text().endswith("}\n")
    assert [line["step"] for line in RunFolder(stopped).metrics()] == [0, 1, 2, 3, 3, 4, 5, 6, 6]


def test_a_run_goes_on_from_the_older_checkpoint(
    stopped: Path, whole: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the message says, and it ends as if nothing had happened."""
    flip(stopped / "checkpoint-6" / "optimizer.pt")
    assert "goes on from checkpoint-4" in refused(capsys, "train", "--resume", stopped)
    shutil.rmtree(stopped / "checkpoint-6")
    train(RunFolder.open(stopped), quiet())
    assert_same_run(RunFolder(stopped), whole)


def test_no_older_checkpoint_is_a_new_beginning(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(stopped / "checkpoint-4" / "optimizer.pt")
    flip(stopped / "checkpoint-6" / "optimizer.pt")
    assert refused(capsys, "train", "--resume", stopped).endswith(
        "--resume goes on from the beginning, for there is no other checkpoint that is whole"
    )


def test_what_is_no_checkpoint_is_said(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stray = stopped / "checkpoint-99"
    stray.mkdir()
    said = refused(capsys, "train", "--resume", stopped)
    assert said.startswith(f"{stray} is damaged: manifest.json is missing: ")
    assert said.endswith(f"move {stray} away, and --resume goes on from checkpoint-6")
    stray.rmdir()
    stray.write_text("")
    assert refused(capsys, "train", "--resume", stopped).startswith(f"{stray} is damaged: it is no folder: ")
    stray.unlink()
    stray.symlink_to(stopped / "nowhere")
    assert refused(capsys, "train", "--resume", stopped).startswith(f"{stray} is damaged: it is no folder: ")
    stray.unlink()
    shutil.copytree(stopped / "checkpoint-4", stray)
    assert refused(capsys, "train", "--resume", stopped).startswith(
        f"{stray} is not what it is called: it was saved after step 4: "
    )


def test_a_checkpoint_may_be_a_link(stopped: Path, whole: RunFolder, tmp_path: Path) -> None:
    """The run goes on from it; what the link leads to is the user's, and is left alone."""
    (stopped / "checkpoint-6").rename(tmp_path / "elsewhere")
    (stopped / "checkpoint-6").symlink_to(tmp_path / "elsewhere")
    train(RunFolder.open(stopped), quiet())
    assert_same_run(RunFolder(stopped), whole)
    assert sorted(path.name for path in stopped.glob("checkpoint-*")) == ["checkpoint-8"]
    assert manifest.fault(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("damage", [flip, cut, empty], ids=lambda damage: damage.__name__)
def test_a_summary_may_not_be_damaged(
    whole: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    folder = RunFolder(Path(shutil.copytree(whole.path, tmp_path / "run")))
    summary = folder.summary()
    assert summary is not None
    damage(folder.path / "summary.json")
    said = refused(capsys, "train", "--resume", folder.path)
    assert said.startswith(f"{folder.path / 'summary.json'} is damaged (")
    assert said.endswith("move it away, and --resume goes on from checkpoint-8")
    (folder.path / "summary.json").unlink()
    train(folder, quiet())
    again = folder.summary()
    assert again is not None
    assert again["validation_loss"] == summary["validation_loss"]


def test_the_metrics_of_a_finished_run_may_not_be_damaged(
    whole: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(Path(shutil.copytree(whole.path, tmp_path / "run")))
    lines_lost(folder.path / "metrics.jsonl")
    assert refused(capsys, "train", "--resume", folder.path).startswith(f"{folder.path / 'metrics.jsonl'} is damaged: ")


def test_a_run_of_an_older_version_is_adopted(
    stopped: Path, whole: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """It had no manifests, and the files are taken as they are, when the user says so."""
    for path in stopped.rglob(manifest.MANIFEST):
        path.unlink()
    assert refused(capsys, "train", "--resume", stopped) == (
        f"{stopped} cannot be verified, for manifest.json is missing (older versions wrote none): put it back, or "
        "trust the files as they are with python -m floragrad.cli.train.adopt RUN"
    )
    adopt.adopt(stopped)
    train(RunFolder.open(stopped), quiet())
    assert_same_run(RunFolder(stopped), whole)


def test_a_finished_run_of_an_older_version_is_adopted(
    whole: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(Path(shutil.copytree(whole.path, tmp_path / "run")))
    summary = folder.summary()
    for path in folder.path.rglob(manifest.MANIFEST):
        path.unlink()
    written = folder.path / "summary.json"
    values = json.loads(written.read_text())
    del values["sha256"], values["metrics"]
    written.write_text(json.dumps(values))
    adopt.adopt(folder.path)
    assert folder.summary() == summary
    assert command("train", "--resume", folder.path) == 0
