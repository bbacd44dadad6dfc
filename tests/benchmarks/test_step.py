"""The step benchmark runs to its end on small layers, and its goals are computed from the figures alone."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from benchmarks import peers, step
from benchmarks.harness import Ratio
from benchmarks.step import ADAPTIVE, EAGER, FLOAT32, GOALS_RUN, INT8, RANKS_RUN, RESAMPLE_RUN, Figures, ranked

WORKS_HERE = ("torch ", "copy", "bitsandbytes", "Hugging Face", "galore", "Flora")
"""Peers whose packages the development environment has, beginnings of names."""


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [replace(run, shapes="layers 64") for run in (*step.RUNS[:4], step.RUNS[5])]
    rows = [[name for name in run.rows if name.startswith(WORKS_HERE) and "Muon" not in name] for run in runs]
    rows[0].append("torchao AdamW8bit")
    monkeypatch.setattr(step, "RUNS", [replace(run, rows=own) for run, own in zip(runs, rows, strict=True)])
    monkeypatch.setattr("benchmarks.harness.PAUSE", 0)


@pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
@pytest.mark.usefixtures("_small")
def test_every_run_ends_and_the_page_has_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.MAKES, "torchao AdamW8bit", lambda groups: groups["no torchao"])
    step.main(["--rounds", "2", "--threads", "1", "--out", str(tmp_path), "--raw", str(tmp_path)])
    page = (tmp_path / "step.md").read_text()
    for run in step.RUNS:
        table = page.partition(f"## {run.title}\n")[2].partition("\n## ")[0]
        assert all(f"| {name} | " in table for name in (peers.FUSED, *run.rows))
    assert "- torchao AdamW8bit: TypeError: list indices" in page
    assert page.count("Error: ") == 1
    assert "not measured: flora-opt" in page
    assert "| rows of Flora whose state differs from the predicted bytes | ≤ 0 | 0 | met |" in page


def test_an_unknown_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--runs", "no such"])
    assert "--runs no such: no title contains it" in capsys.readouterr().err


def test_the_eager_row_runs_no_kernel() -> None:
    param = torch.nn.Parameter(torch.ones(256, 384))
    param.grad = torch.ones_like(param)
    (optimizer,) = step.MAKES[EAGER]([{"kind": "matrix", "params": [param]}])
    taken = []
    optimizer.optimizer.step = lambda: taken.append(optimizer.optimizer.report().rows[0].path)
    optimizer.step()
    assert taken[0].startswith("eager")
    assert not optimizer.optimizer.report().rows[0].path.startswith("eager")


@pytest.mark.parametrize("run", step.RUNS, ids=lambda run: run.title)
def test_rows_have_makers_and_are_listed_once(run: step.Run) -> None:
    assert set(run.rows) <= step.MAKES.keys() - {peers.FUSED}
    assert len(run.rows) == len(set(run.rows))


@pytest.mark.parametrize(
    ("name", "millions"), [("gpt2", 124.44), ("layers", 85.05), ("llama-60m", 58.07), ("t5-small", 60.51)]
)
def test_shapes_are_the_models(name: str, millions: float) -> None:
    """As the models' papers and cards count them, tied tensors once."""
    assert sum(prod(shape) for _, shape in step.specs(name)) / 1e6 == pytest.approx(millions, abs=0.01)


LARGEST = 4 * 768 * 3072


def figures(ratio: float, temporaries: int = 0, state: int = 8) -> Figures:
    return Figures(Ratio(ratio, ratio, ratio), temporaries=temporaries, state=state)


def results() -> dict[str, dict[str, Figures]]:
    goals = {
        peers.FUSED: figures(1.0),
        INT8: figures(1.1, LARGEST // 10),
        FLOAT32: figures(1.01),
        peers.FLORA_OPT: figures(12.0),
        peers.TORCH_ADAFACTOR: figures(4.0),
        peers.HF_ADAFACTOR: figures(5.0),
        EAGER: figures(2.5, LARGEST // 4),
    }
    goals[INT8].predicted = goals[FLOAT32].predicted = 8
    resample = {INT8: figures(1.0), f"{INT8}, resampling": figures(1.25)}
    resample |= {ADAPTIVE: figures(1.1), f"{ADAPTIVE}, resampling": figures(2.2)}
    ranks = {ranked(16): figures(1.0), ranked(256): figures(1.2)}
    return {GOALS_RUN: goals, RESAMPLE_RUN: resample, RANKS_RUN: ranks}


def test_every_goal_from_given_figures() -> None:
    values = [goal.value(results()) for goal in step.GOALS]
    assert values == pytest.approx([1.1 / 12, 1.1 / 4, 1.1, 1.01, 1.2, 2.5, 0.25, 0.1, 1.25, 2.0, 1.01, 0])
    rows = [goal.row(results()) for goal in step.GOALS]
    assert rows[0] == ("step time against flora-opt with momentum", "≤ 0.100", "0.092", "met")
    assert [row[0] for row in rows if row[3] == "not met"] == [
        "the same with float32 state",
        "step time at rank 256 over rank 16",
        "the same with the native kernels",
    ]


def test_state_that_is_not_as_predicted_misses_a_goal() -> None:
    found = results()
    found[GOALS_RUN][INT8].predicted = 7
    assert step.GOALS[-1].row(found)[2:] == ("1", "not met")


def test_a_peer_that_failed_is_why_a_goal_was_not_measured() -> None:
    found = results()
    found[GOALS_RUN][peers.FLORA_OPT] = Figures(error="ImportError: no accelerate")
    del found[RANKS_RUN]
    rows = [goal.row(found) for goal in step.GOALS]
    assert rows[0][2:] == ("—", f"not measured: {peers.FLORA_OPT}: ImportError: no accelerate")
    assert rows[4][2:] == ("—", f"not measured: {RANKS_RUN}")
