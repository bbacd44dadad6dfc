from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from floragrad.cli.compare import compare
from floragrad.cli.presets import PRESETS
from floragrad.cli.train import run
from tests.cli.one_layer import ONE_LAYER
from tests.cli.train.support import Here, save_nothing, write_texts


@pytest.fixture(autouse=True)
def _same_process_afterwards(monkeypatch: pytest.MonkeyPatch, restored_process: None) -> None:
    """Undo what a run sets for its whole process, and keep the hub away.

    Runs of one test draw no picture; those that a module shares do, for they begin before this.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for the processes that a test starts
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(run, "save", save_nothing)


@pytest.fixture(scope="module")
def one_layer() -> Iterator[None]:
    """Let ``tiny`` have one layer instead of three, for what does not depend on how many there are."""
    with pytest.MonkeyPatch.context() as patch:
        for name, preset in ONE_LAYER.items():
            patch.setitem(PRESETS, name, preset)
        yield


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve texts of random words."""
    return write_texts(tmp_path_factory.mktemp("texts") / "words")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """The workers of a comparison, in this process."""
    workers = Here()
    monkeypatch.setattr(compare._Runner, "_train", lambda *arguments: workers.train(*arguments))
    return workers
