"""The tables at the paper's names on local files, and the small models before their first row."""

import json
from dataclasses import replace
from math import inf, log
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, T5Config

from floragrad.cli.compare import worker
from floragrad.cli.errors import UserError
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.corpus import train_tokenizer
from floragrad.cli.train.folder import RunFolder
from replication import experiments
from replication.experiments import PAPER, SMALL, Experiment, Preset, rows
from replication.runs import run_all
from replication.tables import Work, main
from tests.cli.train.support import save_nothing
from tests.cli.train.task_data import WORDS, made_up

__all__ = ["made_up"]

WIDTH = 48
METHODS = ("None", "Naive", "LoRA(2)", "Flora(2)", "Flora, ours")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 and a GPT-2 without weights, and files with the columns of the paper's data sets."""
    folder = tmp_path_factory.mktemp("hub")
    german, english = list(WORDS), list(WORDS.values())
    tokenizer = train_tokenizer([f"translate German to English: summarize: {' '.join(german + english)}"] * 9, 330)
    ids: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 0}
    t5 = {"d_model": WIDTH, "d_kv": 24, "d_ff": 96, "num_heads": 2, "num_layers": 1, "decoder_start_token_id": 0}
    gpt2 = {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 96, "bos_token_id": 0}
    for name, config in (("t5", T5Config(**t5, **ids)), ("gpt2", GPT2Config(**gpt2, **ids))):
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    pairs = [(f"{' '.join(german[i % 6 :])} {i}", " ".join(english[i % 6 :])) for i in range(20)]
    files = {
        "xsum": [{"document": source, "summary": target} for source, target in pairs],
        "iwslt": [{"translation": {"de": source, "en": target}} for source, target in pairs],
    }
    for name, lines in files.items():
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def paper(local: Path) -> Preset:
    """The paper's preset, with other names and sizes: fine-tuning of the GPT-2, and the T5 from scratch."""
    models = {"seq2seq": local / "gpt2", "summarization": local / "t5"}
    sources = {"seq2seq": {"dataset_config": None, "dataset": "iwslt"}, "summarization": {"dataset": "xsum"}}
    return replace(
        PAPER,
        experiments=tuple(
            replace(experiment, model=str(models[experiment.task]), ranks=(2,), epochs=1)
            for experiment in PAPER.experiments[1:3]
        ),
        data={
            task: {
                **options,
                **sources[task],
                "dataset": str(local / str(sources[task]["dataset"])),
                "sequence_length": 64 if task == "seq2seq" else 12,
                "target_length": 32 if task == "seq2seq" else 6,
            }
            for task, options in PAPER.data.items()
        },
        scored=4,
        jobs=0,
    )


def test_the_papers_preset_runs_on_local_files(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(experiments.PRESETS, "paper", paper(local))
    monkeypatch.setattr("floragrad.cli.train.run.save", save_nothing)
    command = ["--preset", "paper", "--seeds", "0", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    main(command)
    page = (tmp_path / "out" / "tables-paper.md").read_text(encoding="utf-8")
    assert all(page.count(f"\n| {name} |") == 2 for name in METHODS)
    assert "| method | BLEU | validation loss |" in page
    assert "| method | ROUGE-1 | ROUGE-2 | ROUGE-L | validation loss |" in page
    runs = {path.name.partition("-lr")[0]: RunFolder(path) for path in tmp_path.glob("runs/*/*-seed0")}
    assert len(runs) == 10
    configs = {name: run.config for name, run in runs.items()}
    found = {name: run.summary() or {} for name, run in runs.items()}
    # All rows read as many examples, but for the last part of a step.
    assert {config.steps * config.accumulate // 16 for config in configs.values() if config.task == "seq2seq"} == {1}
    kept = {name: each["accumulation_bytes"] for name, each in found.items() if name.startswith("accumulation")}
    assert kept["accumulation-none"] == 0 < kept["accumulation-lora-2"]
    assert kept["accumulation-flora-ours"] < kept["accumulation-flora-2"] < kept["accumulation-naive"]
    state = {name: each["optimizer_state_bytes"] for name, each in found.items() if name.startswith("momentum")}
    assert state["momentum-none"] < state["momentum-flora-ours"] < state["momentum-naive"]
    assert state["momentum-flora-2"] < state["momentum-naive"]

    def train_nothing(*_: object) -> int:
        raise AssertionError("a finished run is done again")

    monkeypatch.setattr(worker, "main", train_nothing)
    main(command)
    assert (tmp_path / "out" / "tables-paper.md").read_text(encoding="utf-8") == page


def test_ranks_are_scaled_to_the_width() -> None:
    found = dict(rows(SMALL.experiments[0], SMALL, 128))
    assert [found[f"LoRA({r})"]["rank"] for r in (8, 32, 128, 256)] == [2, 8, 32, 64]
    assert [found[f"Flora({r})"]["accumulator_ratio"] for r in (8, 32, 128, 256)] == [64, 16, 4, 2]
    kappas = {name: row for name, row in rows(SMALL.experiments[2], SMALL, 128) if "κ" in name}
    assert [(row["rank"], row["kappa"]) for row in kappas.values()] == [(64, 1), (64, 10), (64, 1000)]
    assert [name for name, _ in rows(SMALL.experiments[4], SMALL, 64)] == ["None", "Naive", "Flora(32)", "Flora(256)"]
    momentum = dict(rows(PAPER.experiments[2], PAPER, 512))
    assert [momentum[f"Flora({r})"]["rank"] for r in (32, 256)] == [32, 256]


@pytest.mark.usefixtures("made_up")
def test_a_small_model_is_trained_before_it_is_tuned(tmp_path: Path) -> None:
    preset = replace(SMALL, width=32, layers=1, vocabulary=330, scored=4, pretraining={"steps": 2})
    work = Work(preset, tmp_path, (0, 1), jobs=0, threads=1)
    sizes: dict[str, Any] = {
        "batch": 1,
        "examples": 8,
        "ranks": (),
        "lr": 1e-2,
        "lora_lr": 1e-2,
        "our_lr": 1e-3,
        "our_embedding_lr": 1e-2,
    }
    tuned, new = (work.rows(Experiment(name=name, task="seq2seq", **sizes)) for name in ("accumulation", "momentum"))
    assert list(tuned) == ["None", "Naive", "Flora, ours"]
    assert {config.model for config in tuned.values()} == {str(tmp_path / "seq2seq" / "pretrained" / "checkpoint-2")}
    assert new["None"].model == str(tmp_path / "seq2seq" / "small")


def test_rates_are_searched_until_the_best_is_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"None": 0.1, "Naive": 0.01, "Flora": 0.001}
    done: list[Path] = []

    def loss(run: Path) -> float:
        name = {"none": "None", "naive": "Naive", "flora": "Flora"}[run.name.split("-")[1]]
        lr = float(run.name.partition("-lr")[2].partition("-seed")[0])
        return inf if lr > 0.5 else abs(log(lr / best[name]))

    monkeypatch.setattr("replication.tables.run_all", lambda runs, jobs: done.extend(runs))
    monkeypatch.setattr("replication.tables._loss", loss)
    work = Work(SMALL, tmp_path, (0, 1), jobs=0, threads=1)
    experiment = SMALL.experiments[0]
    config = RunConfig.resolve(task="seq2seq", steps=1, lr=0.01)
    configs = dict.fromkeys(("None", "Naive", "Flora(8)", "Flora(32)"), config)
    losses = work.search(experiment, configs)
    assert {name: [round(lr, 5) for lr in rates] for name, rates in losses.items()} == {
        "None": [0.00333, 0.01, 0.03, 0.09, 0.27],
        "Naive": [0.00333, 0.01, 0.03],
        "Flora": [0.00037, 0.00111, 0.00333, 0.01, 0.03],
    }
    assert not any("flora-8" in run.name or "seed1" in run.name for run in done)
    runs = work.runs(experiment, configs, losses)
    assert {name: [round(each.lr, 5) for each in row.values()] for name, row in runs.items()} == {
        "None": [0.09] * 2,
        "Naive": [0.01] * 2,
        "Flora(8)": [0.00111] * 2,
        "Flora(32)": [0.00111] * 2,
    }
    assert [each.seed for each in runs["None"].values()] == [0, 1]
    assert set(runs["Flora(32)"]) & set(done)
    given = Work(replace(SMALL, search=False), tmp_path, (0,), jobs=0, threads=1)
    assert given.search(experiment, configs) == {}
    assert next(iter(given.runs(experiment, configs, {})["None"].values())).lr == 0.01


def test_runs_with_other_options_are_not_mixed(tmp_path: Path) -> None:
    config = RunConfig.resolve(task="seq2seq", steps=1, prepared="../corpus")
    path = tmp_path / "run"
    with pytest.raises(UserError, match="ended with exit code 2: the same command continues it"):
        run_all({path: config}, 0)
    with pytest.raises(UserError, match="holds a run with other options"):
        run_all({path: replace(config, seed=1)}, 0)
