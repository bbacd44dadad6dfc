import signal
from pathlib import Path

import pytest
import torch

from floragrad.cli.errors import StoppedError
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.run import begin, train
from tests.cli.train.support import (
    Meddler,
    assert_same_run,
    fast_config,
    interrupt,
    quiet,
    run,
    saved_state,
    timeless,
    write_gpt2,
)

pytestmark = pytest.mark.usefixtures("one_layer")


def assert_same(folder: RunFolder, other: RunFolder) -> None:
    """The two runs cannot be told apart, but for the time they took."""
    assert_same_run(folder, other)
    for tensor, wanted in zip(saved_state(folder), saved_state(other), strict=True):
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)


MORE = {"schedule": "constant", "gradient_checkpointing": True}
CASES = {
    "flora redrawn": {"kappa": 3, "rank": 8, "lr": 1e-3},
    "flora adaptive": {"projection": "adaptive", "kappa": 3, "state_dtype": "int4"},
    "flora gaussian": {"projection": "gaussian", "kappa": 3, "state_dtype": "float32"},
    "flora bfloat16": {"dtype": "bfloat16", "state_dtype": "bfloat16", "weight_decay": 0.1},
    "flora sketched": {"accumulate": 3, "batch_size": 1, "accumulator_ratio": 2},
    "flora sketched in bfloat16": {"accumulate": 3, "batch_size": 1, "dtype": "bfloat16", "release": False, **MORE},
    "flora accumulated": {"accumulate": 3, "batch_size": 1, "accumulator": "exact"},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "linear"},
    "adafactor": {"optimizer": "adafactor"},
}


QUICK = {"flora redrawn", "flora adaptive", "flora sketched in bfloat16", "adamw"}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, options in CASES.items()
    ],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(texts: Path, tmp_path: Path, options: dict) -> None:
    config = fast_config(texts, **{"eval_every": 3, **options})
    assert_same(interrupt(config, tmp_path / "stopped", 3, 5), run(config, tmp_path / "whole"))


def test_random_numbers_go_on_where_they_stopped(texts: Path, tmp_path: Path) -> None:
    model = write_gpt2(tmp_path / "gpt2", texts, dropout=0.3)
    config = fast_config(texts, model=str(model), rank=8, lr=1e-3, eval_every=2)
    assert_same(interrupt(config, tmp_path / "stopped", 3), run(config, tmp_path / "whole"))


def test_a_text_may_change_or_vanish_meanwhile(tmp_path: Path, texts: Path) -> None:
    own = tmp_path / "text.txt"
    own.write_text("".join(path.read_text() for path in sorted(texts.iterdir())))
    config = fast_config(own)
    whole = run(config, tmp_path / "whole")
    folder = begin(config, tmp_path / "stopped")
    with pytest.raises(StoppedError):
        train(folder, Meddler(3, signal.SIGTERM))
    own.unlink()
    train(folder, quiet())
    assert_same(folder, whole)


@pytest.mark.parametrize("save_every", [2, 100])
def test_a_crash_loses_only_what_came_after_the_checkpoint(texts: Path, tmp_path: Path, save_every: int) -> None:
    config = fast_config(texts, save_every=save_every)
    folder = begin(config, tmp_path / "crashed")
    with pytest.raises(ZeroDivisionError):
        train(folder, Meddler(5, ZeroDivisionError()))
    assert [step for step, _ in folder.checkpoints()] == ([4] if save_every == 2 else [])
    train(folder, quiet())
    assert_same(folder, run(config, tmp_path / "whole"))


def test_a_crash_after_the_last_step_loses_nothing(texts: Path, tmp_path: Path) -> None:
    folder = run(fast_config(texts), tmp_path / "run")
    before, summary = timeless(folder), folder.summary()
    assert summary is not None
    (folder.path / "summary.json").unlink()
    train(folder, quiet())
    again = folder.summary()
    assert again is not None
    assert timeless(folder) == before
    changing = {"seconds", "peak_memory_bytes"}
    assert {name: again[name] for name in again.keys() - changing} == {
        name: summary[name] for name in summary.keys() - changing
    }


def test_the_signal_says_how_to_go_on(texts: Path, tmp_path: Path) -> None:
    folder = begin(fast_config(texts), tmp_path / "run")
    with pytest.raises(StoppedError) as caught:
        train(folder, Meddler(2, signal.SIGTERM))
    assert str(caught.value) == f"stopped and saved; continue with: floragrad train --resume {folder.path}"
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_at_the_last_step_changes_nothing(texts: Path, tmp_path: Path) -> None:
    config = fast_config(texts)
    folder = begin(config, tmp_path / "run")
    train(folder, Meddler(config.steps, signal.SIGINT))
    assert folder.summary() is not None
