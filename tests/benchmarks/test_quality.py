"""Studies of whole runs train, choose a rate and continue; a peer's optimizer does AdamW's job."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from benchmarks import quality
from floragrad import plan
from tests.cli.train.support import FAST, newest, save_nothing, write_texts

ROWS = {"Flora": {}, "AdamW": {"optimizer": "adamw"}, "peer": {"optimizer": "adamw-8bit"}}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> quality.Study:
    texts = (str(write_texts(tmp_path / "texts")),)
    study = quality.Study("A study", {**FAST, "text": texts, "eval_every": 4}, ROWS, (1e-3, 1e-2))
    monkeypatch.setitem(quality.STUDIES, "jax_training", study)
    monkeypatch.setattr(quality, "SEEDS", (0, 1))
    monkeypatch.setattr("floragrad.cli.train.run.save", save_nothing)
    return study


def test_a_study_trains_every_row_once_and_writes_a_page(tmp_path: Path, study: quality.Study) -> None:
    command = ["jax_training", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--rows", "Flora", "AdamW"]
    quality.main(command)
    page = (tmp_path / "jax_training.md").read_text()
    assert len(list((tmp_path / "runs").iterdir())) == 2 * 3
    _, lr, seeds = quality.find(study, "Flora", tmp_path / "runs")
    losses = [each["validation_loss"] for each in seeds]
    assert f"| {lr:g} | {sum(losses) / 2:.4f} ± " in page
    assert lr == min(
        study.lrs, key=lambda lr: quality.find(study, "Flora", tmp_path / "runs")[0][lr]["validation_loss"]
    )


def test_bitsandbytes_does_adamws_job_in_eight_bits(tmp_path: Path, study: quality.Study) -> None:
    curves = []
    for name in ("AdamW", "peer"):
        summary = quality.run(name, {**study.job, **study.rows[name]}, tmp_path / name)
        curves.append([loss for _, loss in sorted(summary["curve"].items())])
    assert curves[0][0] == curves[1][0]
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], abs=0.05)
    model = AutoModelForCausalLM.from_pretrained(newest(quality.RunFolder.open(tmp_path / "peer")))
    planned = plan(model, sequence=FAST["sequence_length"], optimizers=("adamw-8bit",)).optimizers["adamw-8bit"]
    assert summary["optimizer_state_bytes"] == planned.optimizer_state
    assert "bitsandbytes" in summary["versions"]
