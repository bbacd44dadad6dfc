"""Behaviours of every task beside language modeling."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

from floragrad.cli.compare.compare import begin, compare
from floragrad.cli.compare.plan import Plan
from floragrad.cli.errors import UserError
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.data import Examples
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.measures import format_measure
from floragrad.cli.train.tasks import TASKS, images, pairs
from tests.cli.train.support import (
    Here,
    assert_same_run,
    command,
    interrupt,
    newest,
    read_json,
    refused,
    run,
    timeless,
    tree,
)
from tests.cli.train.task_data import FAST, MEASURES, made_up, task_config

__all__ = ["made_up"]

pytestmark = pytest.mark.usefixtures("made_up")
EVERY_TASK = pytest.mark.parametrize("task", FAST)


def served(blocks: Examples) -> list[dict[str, Any]]:
    return [{name: value.tolist() for name, value in blocks[place].items()} for place in range(len(blocks))]


def trained(folder: RunFolder) -> Any:
    auto = getattr(transformers, TASKS[folder.config.task].auto_class)
    return auto.from_pretrained(newest(folder)).eval()


@EVERY_TASK
def test_an_interrupted_run_ends_as_if_it_had_not_been(task: str, tmp_path: Path) -> None:
    config = task_config(task, steps=6, eval_every=3, kappa=2)
    assert_same_run(interrupt(config, tmp_path / "stopped", 3), run(config, tmp_path / "whole"))


@EVERY_TASK
def test_a_run_learns_and_says_what_it_measures(task: str, tmp_path: Path) -> None:
    folder = run(task_config(task, steps=40, lr=3e-3, eval_every=20, save_every=40), tmp_path / "run")
    summary = folder.summary()
    assert summary is not None
    assert (summary["task"], summary["examples"]) == (task, 160)
    assert "tokens" not in summary
    assert summary["validation_loss"] < 0.7 * summary["first_validation_loss"]
    assert len(summary["block_losses"]) == 10 <= summary["held_out_blocks"]
    evaluations = [line for line in folder.metrics() if "validation_loss" in line]
    for name in MEASURES[task]:
        assert summary[name] == evaluations[-1][name]
    better = max(MEASURES[task])
    assert evaluations[0][better] < evaluations[-1][better] <= 1
    model = trained(folder)
    data = TASKS[task].load(folder.corpus)
    batch = TASKS[task].collate(list(map(data.validation_blocks(folder.config).__getitem__, range(10))))
    with torch.no_grad():
        found = {name: values.tolist() for name, values in TASKS[task].examine(model, batch).items()}
    assert found["loss"] == pytest.approx(summary["block_losses"], rel=1e-4, abs=1e-5)
    assert np.mean(found[better]) == pytest.approx(summary[better])


@EVERY_TASK
def test_the_order_depends_on_the_seed_and_the_validation_on_nothing(task: str, tmp_path: Path) -> None:
    config = task_config(task, steps=50)
    data = TASKS[task].prepare(config, tmp_path / "corpus")
    assert TASKS[task].load(tmp_path / "corpus") == data
    again, other = replace(config, optimizer="adamw"), replace(config, seed=1)
    orders = [served(data.train_blocks(each)) for each in (config, again, other)]
    assert len(orders[0]) == config.steps * config.batch_size
    assert orders[0] == orders[1] != orders[2]
    held_out = served(data.validation_blocks(config))
    assert held_out == served(data.validation_blocks(other))
    assert len(held_out) == 10 < data.held_out_blocks(config)


@EVERY_TASK
def test_the_first_batch_is_the_same_for_every_optimizer(task: str, tmp_path: Path) -> None:
    first = [
        timeless(run(task_config(task, optimizer=name, steps=2, keep_checkpoint=False), tmp_path / name))[:2]
        for name in ("flora", "adamw")
    ]
    for start, step in first:
        assert start == first[0][0]
        assert (step["loss"], step["grad_norm"]) == (first[0][1]["loss"], first[0][1]["grad_norm"])


@EVERY_TASK
def test_accumulated_batches_are_one_large_batch(task: str, tmp_path: Path) -> None:
    options = {"steps": 3, "optimizer": "adamw", "max_grad_norm": 1e9, "keep_checkpoint": False}
    whole = run(task_config(task, batch_size=4, **options), tmp_path / "whole")
    parts = run(task_config(task, batch_size=1, accumulate=4, **options), tmp_path / "parts")
    for one, other in zip(whole.metrics(), parts.metrics(), strict=True):
        assert one["examples"] == other["examples"]
        for name in {"loss", "validation_loss", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-3)


@EVERY_TASK
def test_bfloat16_weights_are_trained(task: str, tmp_path: Path) -> None:
    folder = run(task_config(task, dtype="bfloat16", steps=2), tmp_path / "run")
    assert {parameter.dtype for parameter in trained(folder).parameters()} == {torch.bfloat16}


@EVERY_TASK
def test_a_comparison_has_a_column_for_each_measure(task: str, tmp_path: Path, here: Here) -> None:
    options = {**FAST[task], "task": task, "steps": 1, "keep_checkpoint": False}
    grid = {"accumulators": None, "seeds": (0, 1), "lrs": None, "embedding_lrs": None}
    out = tmp_path / "out"
    begin(Plan(methods=("flora",), **grid, options=options, command="floragrad compare"), out)
    compare(out, Console(quiet=True))
    flora = [read_json(path / "summary.json") for path in (out / "runs").glob("flora-*")]
    row = read_json(out / "table.json")["rows"][0]
    text = (out / "table.md").read_text(encoding="utf-8")
    for name in MEASURES[task]:
        assert row[name] == pytest.approx(np.mean([summary[name] for summary in flora]))
        assert f"| {format_measure(name, row[name])} |" in text.splitlines()[2]
    assert f"{task}-tiny, 1 steps of 4 examples; seed(s) 0, 1" in text
    assert f"validated on 10 of {flora[0]['held_out_blocks']} {TASKS[task].blocks}, drawn from all of them" in text
    assert len({line.count("|") for line in text.splitlines()[:3]}) == 1


@pytest.mark.parametrize(
    ("task", "place", "package"),
    [
        ("vision", (images, "FASHION_MNIST"), "apt-get install dataset-fashion-mnist"),
        ("seq2seq", (pairs, "DICTIONARY"), "apt-get install dict-freedict-deu-eng"),
        ("summarization", (pairs, "LISTS"), "apt-get -o Acquire::Languages=en update"),
    ],
)
def test_data_that_are_not_installed_are_named_with_their_package(
    task: str,
    place: tuple[Any, str],
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(*place, tmp_path / "nowhere" / "stem")
    for name in ("train", "compare"):
        message = refused(capsys, name, "--task", task, "--out", tmp_path / "run")
        assert f"not in {tmp_path}" in message
        assert f"{package} on Debian or Ubuntu, or give a --dataset" in message
        assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "audio"}, "--task 'audio' is unknown: choose one of lm, seq2seq, summarization, vision"),
        ({"task": "vision", "text": ("a",)}, "--text belongs to --task lm, and this is vision: leave it out"),
        (
            {"task": "vision", "sequence_length": 16},
            "--sequence-length belongs to --task lm, seq2seq and summarization, and this is vision: leave it out",
        ),
        ({"task": "seq2seq", "text": ("a",)}, "--text belongs to --task lm, and this is seq2seq: leave it out"),
        (
            {"source_column": "de", "dataset": "a"},
            "--source-column belongs to --task seq2seq, summarization and vision, and this is lm: leave it out",
        ),
        (
            {"task": "vision", "target_column": "label"},
            "--target-column belongs to --dataset, which is not given: add it, or leave it out",
        ),
        (
            {"task": "vision", "model": "60m"},
            "--model 60m is none of --task vision, which trains new models of its own: choose tiny, or leave it out",
        ),
        (
            {"task": "summarization", "model": "small"},
            "--model small is none of --task summarization, or a model of Hugging Face: choose tiny, or leave it out",
        ),
        (
            {"source_prefix": "summarize: "},
            "--source-prefix belongs to --task seq2seq and summarization, and this is lm",
        ),
        (
            {"task": "vision", "generate_blocks": 8},
            "--generate-blocks belongs to --task seq2seq and summarization, and",
        ),
        ({"task": "seq2seq", "backend": "jax"}, "--backend jax trains language models, and --task is seq2seq: "),
    ],
)
def test_what_does_not_belong_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.resolve(**options)
    assert str(caught.value).startswith(message)


def test_a_run_tells_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fast = [f"--{name.replace('_', '-')}={value}" for name, value in FAST["vision"].items()]
    assert command("train", "--task", "vision", *fast) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[0].startswith("run folder: runs/vision-tiny-flora-")
    assert lines[1].startswith("vision-tiny: ")
    assert lines[2] == "Fashion-MNIST: 90 images of 3 classes to train on, 30 held out"
    assert lines[3] == "validation with 10 of 30 held-out images, drawn from all of them"
    assert "images/s" not in said.out
    assert "examples/s" in said.out
    assert ", accuracy " in said.out


def test_adapters_of_a_vit_go_on_where_they_stopped(tmp_path: Path) -> None:
    """With gradient checkpointing, which changes none of its numbers."""
    config = task_config("vision", optimizer="lora", steps=4, eval_every=2, rank=4)
    folder = interrupt(replace(config, gradient_checkpointing=True), tmp_path / "stopped", 2)
    assert timeless(folder) == timeless(run(config, tmp_path / "whole"))
