import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CTRLConfig, TrainerCallback, TrainerState
from transformers.integrations import integration_utils
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from floragrad import Flora, param_groups
from floragrad.cli.errors import DivergenceError, UserError
from floragrad.cli.methods import DEFAULT_METHODS
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.corpus import Corpus
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.optimizers import optimizer_class
from floragrad.cli.train.run import begin, check_model, train
from floragrad.policy import plan_accumulator
from tests.cli.train.support import (
    assert_same_run,
    fast_config,
    newest,
    quiet,
    read_json,
    run,
    saved_state,
    timeless,
    tree,
    write_gpt2,
)

pytestmark = pytest.mark.usefixtures("one_layer")


@dataclass
class Finished:
    """A finished run and its summary."""

    folder: RunFolder
    config: RunConfig
    summary: dict


@pytest.fixture(scope="module", params=DEFAULT_METHODS)
def finished(request: pytest.FixtureRequest, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    config = fast_config(texts, optimizer=request.param, steps=20, eval_every=8, save_every=7)
    folder = run(config, tmp_path_factory.mktemp("runs") / request.param)
    return Finished(folder, config, read_json(folder.path / "summary.json"))


def model_of(folder: RunFolder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(newest(folder))


def test_state_bytes_are_those_of_the_state(finished: Finished) -> None:
    measured = sum(tensor.numel() * tensor.element_size() for tensor in saved_state(finished.folder))
    assert finished.summary["optimizer_state_bytes"] == measured


def test_state_bytes_are_those_of_the_report(finished: Finished) -> None:
    report = Flora(param_groups(model_of(finished.folder), lr=1e-3), rank=finished.config.rank or 48).report()
    expected = {"flora": report.state_bytes, "adamw": report.adamw_bytes, "adafactor": report.adafactor_bytes}
    assert finished.summary["adamw_state_bytes"] == report.adamw_bytes
    difference = finished.summary["optimizer_state_bytes"] - expected[finished.config.optimizer]
    scalars = {"flora": 0, "adamw": 0, "adafactor": 4 * len(report.rows)}  # Adafactor keeps each tensor's RMS
    assert difference in (0, scalars[finished.config.optimizer])


def test_each_step_is_written_once(finished: Finished) -> None:
    lines = finished.folder.metrics()
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 8, 16, 20]
    assert all(line["tokens"] == 32 * line["step"] for line in lines)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_learning_rates_rise_then_fall_as_a_cosine(finished: Finished) -> None:
    config = finished.config
    for line in finished.folder.metrics():
        if "loss" not in line:
            continue
        done = line["step"] - 1
        warm = config.warmup_steps
        progress = (done - warm) / (config.steps - warm)
        factor = done / warm if done < warm else 0.5 * (1 + math.cos(math.pi * progress))
        assert line["lr"] == pytest.approx(config.lr * factor)
        assert line["embedding_lr"] == pytest.approx(config.embedding_lr * factor)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_schedule_is_chosen(texts: Path, tmp_path: Path, schedule: str) -> None:
    config = fast_config(texts, schedule=schedule, steps=6, warmup_steps=2, keep_checkpoint=False)
    rates = [line["lr"] for line in run(config, tmp_path / "run").metrics() if "loss" in line]
    left = {"linear": [1, 3 / 4, 2 / 4, 1 / 4], "constant": [1, 1, 1, 1]}[schedule]
    assert rates == pytest.approx([config.lr * factor for factor in (0, 1 / 2, *left)])


@pytest.mark.parametrize("gpt2", [False, True], ids=["sketched", "dropout"])
def test_checkpointing_computes_the_layers_again_and_changes_nothing(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: bool
) -> None:
    layer, options = LlamaMLP, {"accumulate": 2, "batch_size": 1}
    if gpt2:
        layer, options = GPT2MLP, {"model": str(write_gpt2(tmp_path / "gpt2", texts, dropout=0.3)), "rank": 8}
    calls, forward = [], layer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", counted)
    runs, trained = [], []
    for checkpointing in (False, True):
        config = fast_config(texts, **options, steps=3, lr=1e-3, gradient_checkpointing=checkpointing)
        calls.clear()
        runs.append(run(config, tmp_path / str(checkpointing)))
        trained.append(sum(calls))
    assert trained[1] == 2 * trained[0]
    assert_same_run(runs[1], runs[0])


def test_a_model_that_keeps_its_activations_is_refused(texts: Path, tmp_path: Path) -> None:
    CTRLConfig(vocab_size=300, n_embd=32, n_head=2, n_layer=1, dff=32).save_pretrained(tmp_path / "ctrl")
    config = fast_config(texts, model=str(tmp_path / "ctrl"), rank=8, gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"--gradient-checkpointing is not supported by .*CTRLLMHeadModel: leave it"):
        begin(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Service(TrainerCallback):
    """A service that the Trainer reports to."""

    told: ClassVar[list[tuple[int, dict[str, float]]]] = []

    def on_log(self, _args: Any, state: TrainerState, _control: Any, logs: dict[str, float], **_kwargs: Any) -> None:
        self.told.append((state.global_step, dict(logs)))


def test_a_service_is_told_what_the_metrics_have(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "service", Service)
    monkeypatch.setattr(Service, "told", [])
    config = fast_config(texts, steps=4, eval_every=2, report_to=("service",))
    folder, expected = run(config, tmp_path / "run"), []
    for line in folder.metrics():
        step, validated = line.pop("step"), "validation_loss" in line
        line.pop("block_losses", None)
        names = {name: f"eval_{name.removeprefix('validation_')}" if validated else name for name in line}
        expected.append((step, {names[name]: value for name, value in line.items()}))
    assert Service.told == expected
    assert {"loss", "lr", "embedding_lr", "grad_norm", "tokens"} < Service.told[1][1].keys()
    assert {"eval_loss", "eval_perplexity", "eval_standard_error"} < Service.told[0][1].keys()
    assert timeless(folder) == timeless(run(replace(config, report_to=("none",)), tmp_path / "silent"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", r"--report-to nobody is unknown: nobody is not supported, only azure_ml, .*tensorboard.* supported"),
        (
            "flyte",
            r"--report-to flyte is not installed \(FlyteCallback .*`pip install flytekit`\.\): do so, or leave it",
        ),
    ],
)
def test_a_service_that_cannot_be_told_is_refused(texts: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        begin(fast_config(texts, report_to=(name,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_model_learns(finished: Finished) -> None:
    summary = finished.summary
    losses = [line["validation_loss"] for line in finished.folder.metrics() if "validation_loss" in line]
    assert summary["first_validation_loss"] == losses[0] == pytest.approx(math.log(300), abs=0.2)
    assert summary["validation_loss"] == losses[-1] < 0.8 * losses[0]
    assert summary["validation_loss_change"] == losses[-1] / losses[0] - 1
    assert summary["perplexity"] == math.exp(losses[-1])


def test_the_checkpoint_is_the_model_that_was_validated(finished: Finished) -> None:
    blocks = Corpus.load(finished.folder.corpus).validation_blocks(finished.config)
    assert len(blocks) == finished.config.eval_blocks
    rows = torch.tensor(np.stack([blocks[position]["input_ids"] for position in range(len(blocks))]))
    with torch.no_grad():
        model = model_of(finished.folder)
        loss = model(input_ids=rows, labels=rows).loss.item()
        blocks = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    assert loss == pytest.approx(finished.summary["validation_loss"], rel=1e-5)
    assert finished.summary["block_losses"] == pytest.approx(blocks, rel=1e-5)
    assert finished.summary["standard_error"] == pytest.approx(stdev(blocks) / len(blocks) ** 0.5, rel=1e-3)


def test_the_folder_holds_everything_and_nothing_half_written(finished: Finished) -> None:
    top = sorted(path.name for path in finished.folder.path.iterdir())
    assert top == [
        *("checkpoint-20", "config.json", "corpus", "loss.png"),
        *("manifest.json", "metrics.jsonl", "summary.json"),
    ]
    assert finished.folder.config == finished.config
    assert (finished.folder.path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_batch_is_the_same_for_every_optimizer(texts: Path, tmp_path: Path) -> None:
    first = [
        timeless(run(fast_config(texts, optimizer=name, steps=2, keep_checkpoint=False), tmp_path / name))[:2]
        for name in DEFAULT_METHODS
    ]
    for start, step in first:
        assert start == first[0][0]
        assert (step["loss"], step["grad_norm"]) == (first[0][1]["loss"], first[0][1]["grad_norm"])


def test_another_seed_is_another_run(texts: Path, tmp_path: Path) -> None:
    zero, one = (timeless(run(fast_config(texts, steps=2, seed=seed), tmp_path / str(seed))) for seed in (0, 1))
    assert zero[0]["validation_loss"] != one[0]["validation_loss"]
    assert zero[1]["loss"] != one[1]["loss"]


def test_accumulated_batches_are_one_large_batch(texts: Path, tmp_path: Path) -> None:
    options = {"steps": 3, "optimizer": "adamw", "max_grad_norm": 1e9}
    whole = run(fast_config(texts, batch_size=4, **options), tmp_path / "whole")
    parts = run(fast_config(texts, batch_size=1, accumulate=4, **options), tmp_path / "parts")
    for one, other in zip(whole.metrics(), parts.metrics(), strict=True):
        assert one["tokens"] == other["tokens"]
        for name in ("loss", "validation_loss", "grad_norm"):
            if name in one:
                assert one[name] == pytest.approx(other[name], rel=1e-4)


GATHERING = {"batch_size": 1, "accumulate": 4, "steps": 4}


@pytest.mark.parametrize("release", [{"release": True}, {"release": False}, {"optimizer": "adamw"}], ids=str)
def test_a_sketch_of_every_number_is_the_sum(texts: Path, tmp_path: Path, release: dict[str, Any]) -> None:
    optimizer = release.get("optimizer", "flora")
    exact = run(fast_config(texts, accumulator="exact", optimizer=optimizer, **GATHERING), tmp_path / "exact")
    sketch = {"accumulator": "flora", "accumulator_dtype": "float32", **release}
    sketched = run(fast_config(texts, **sketch, **GATHERING), tmp_path / "sketched")
    for one, other in zip(exact.metrics(), sketched.metrics(), strict=True):
        for name in ("loss", "validation_loss", "grad_norm"):
            if name in one:
                assert one[name] == pytest.approx(other[name], rel=1e-5)


def test_gathered_bytes_are_the_policys(texts: Path, tmp_path: Path) -> None:
    folder = run(fast_config(texts, accumulator_ratio=2, accumulator_dtype="int8", **GATHERING), tmp_path / "run")
    summary, model = folder.summary(), model_of(folder)
    assert summary is not None
    groups = param_groups(model, lr=1e-3)
    kinds = {name: group["kind"] for group in groups for name, _ in group["params"]}
    plans = [
        plan_accumulator(
            tuple(parameter.shape),
            ratio=2,
            state_dtype="int8",
            kind=None if kinds[name] == "vector" else kinds[name],
        )
        for name, parameter in model.named_parameters()
    ]
    assert summary["accumulation_bytes"] == sum(each.state_bytes for each in plans)
    assert summary["gradient_bytes"] == sum(4 * parameter.numel() for parameter in model.parameters())
    assert (summary["accumulator"], summary["micro_batches"]) == ("flora", 4)


def test_without_accumulation_a_micro_batch_makes_a_step(texts: Path, tmp_path: Path) -> None:
    none = run(fast_config(texts, accumulator="none", **GATHERING), tmp_path / "none")
    alone = run(fast_config(texts, batch_size=1, steps=4), tmp_path / "alone")
    assert timeless(none) == timeless(alone)


def test_bfloat16_weights_are_trained(texts: Path, tmp_path: Path) -> None:
    folder = run(fast_config(texts, dtype="bfloat16", steps=20), tmp_path / "run")
    summary = folder.summary()
    assert summary is not None
    assert {parameter.dtype for parameter in model_of(folder).parameters()} == {torch.bfloat16}
    assert summary["validation_loss_change"] < -0.2


def test_the_checkpoint_is_not_kept_where_nobody_wants_it(texts: Path, tmp_path: Path) -> None:
    folder = run(fast_config(texts, keep_checkpoint=False, steps=4, save_every=2), tmp_path / "run")
    assert folder.checkpoints() == []
    assert folder.summary() is not None


def test_a_folders_model_is_trained_with_its_own_tokenizer(texts: Path, tmp_path: Path) -> None:
    model = write_gpt2(tmp_path / "gpt2", texts)
    config = fast_config(texts, model=str(model), rank=8, lr=1e-3)
    folder = run(config, tmp_path / "run")
    own = (model / "tokenizer.json").read_text()
    assert (folder.corpus / "tokenizer" / "tokenizer.json").read_text() == own
    assert type(model_of(folder)).__name__ == "GPT2LMHeadModel"


def test_a_trained_model_goes_on_from_its_weights(texts: Path, tmp_path: Path) -> None:
    first = run(fast_config(texts, steps=20), tmp_path / "first")
    again = run(fast_config(texts, model=str(newest(first)), rank=48, steps=2), tmp_path / "again")
    ended = first.metrics()[-1]["validation_loss"]
    assert again.metrics()[0]["validation_loss"] == pytest.approx(ended, rel=1e-6)


@pytest.mark.parametrize("rank", [97, 192, 10_000])
def test_a_rank_that_compresses_nothing_is_refused(texts: Path, tmp_path: Path, rank: int) -> None:
    with pytest.raises(UserError, match=rf"--rank {rank} compresses nothing: .* is 192, .* give at most 96"):
        begin(fast_config(texts, rank=rank), tmp_path / "run")
    assert tree(tmp_path) == []


def test_the_largest_rank_that_is_allowed_compresses(texts: Path) -> None:
    config = fast_config(texts, rank=96)
    check_model(config)
    model = torch.nn.Linear(192, 192)
    optimizer, options = optimizer_class(config, model)
    assert optimizer(options.pop("params"), **options).report().compressed == 1


def test_a_run_that_diverges_stops_and_says_where(texts: Path, tmp_path: Path) -> None:
    folder = begin(fast_config(texts, lr=1e30, max_grad_norm=0.0, save_every=1, warmup_steps=1), tmp_path / "run")
    with pytest.raises(DivergenceError, match=r"at step \d+: give a lower --lr") as caught:
        train(folder, quiet())
    last = folder.metrics()[-1]
    assert (last["step"], last.get("loss")) == (caught.value.step, None)
    assert folder.checkpoints()[-1][0] < caught.value.step
    assert folder.summary() is None
    assert all(torch.isfinite(parameter).all() for parameter in model_of(folder).parameters())
