"""The step that is found fits and changes least; the code that is printed is valid, runs and has real arguments."""

import ast
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from floragrad._text import format_bytes
from floragrad.cli.plan import recipe
from floragrad.cli.plan.engine import Planner
from floragrad.cli.plan.models import planned_model
from floragrad.cli.plan.recipe import DEFAULT_UPDATE, MARGIN, NOTHING, Recipe, find_recipe
from floragrad.cli.plan.result import OptimizerName, OptimizerPlan, PlanSettings
from floragrad.cli.plan.sizes import Size
from tests.cli.plan.support import row
from tests.cli.plan.test_command import SMALL, said, there

__all__ = ["there"]
NAMES: tuple[OptimizerName, ...] = ("flora", "flora+accumulator", "flora+release")


class ByHand:
    """A planner of 10 GB of float32 weights: gradients as large, activations of 2 GB a sequence, a quarter with
    checkpointing, sketches of 1 GB."""

    def __init__(self, subject: Any, settings: PlanSettings) -> None:
        self.subject, self.settings = subject, settings

    def row(self, planned: Any, accumulate: int | None = None) -> OptimizerPlan:
        """Of a row by its way to accumulate."""
        half = 0.5 if self.settings.dtype == "bfloat16" else 1.0
        activations = 2.0 * self.settings.batch * half * (0.25 if self.settings.checkpointing else 1)
        gradients = 10 * half if planned.clip is None else 1.0
        sketches = float(planned.clip is not None and (accumulate or self.settings.accumulate) > 1)
        weights = 10 * half
        return row(parameters=weights, gradients=gradients, accumulation=sketches, activations=activations)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("gigabytes", "asked", "name", "found"),
    [
        (200, {}, "flora", {"batch": 16}),
        (40, {}, "flora+accumulator", {"batch": 8, "accumulate": 2}),
        (20, {}, "flora+accumulator", {"batch": 2, "accumulate": 8}),
        (20, {"accumulate": 3}, "flora+accumulator", {"batch": 1, "accumulate": 3}),
        (20, {"batch": 8}, "flora+accumulator", {"batch": 2, "accumulate": 4}),
        (20, {"checkpointing": True}, "flora+accumulator", {"batch": 8, "accumulate": 2, "checkpointing": True}),
        (13.5, {}, "flora+accumulator", {"batch": 1, "accumulate": 16, "checkpointing": True}),
        (12.2, {}, "flora+accumulator", {"dtype": "bfloat16", "batch": 4, "accumulate": 4}),
        (7, {"dtype": "bfloat16"}, "flora+release", {"dtype": "bfloat16", "checkpointing": True}),
    ],
    ids=str,
)
def test_what_is_found_fits_and_changes_least(
    monkeypatch: pytest.MonkeyPatch, gigabytes: float, asked: dict[str, Any], name: str, found: dict[str, Any]
) -> None:
    monkeypatch.setattr(recipe, "Planner", ByHand)
    settings, device = PlanSettings(**asked), Size(round(gigabytes * 10**9), f"{gigabytes} GB")
    chosen = find_recipe(ByHand(None, settings), device)  # type: ignore[arg-type]
    assert chosen is not None
    assert chosen.name == name
    expected = replace(settings, batch=1, accumulate=1) if "batch" not in found else settings
    assert chosen.settings == replace(expected, **{"accumulate": 1, **found})
    assert chosen.row.peak <= (1 - MARGIN) * device.nbytes
    assert f"{format_bytes(device.nbytes - chosen.row.peak)} to spare" in chosen.describe(device, reads_text=True)


def test_where_nothing_fits_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "Planner", ByHand)
    assert find_recipe(ByHand(None, PlanSettings()), Size(6 * 10**9, "6 GB")) is None  # type: ignore[arg-type]


def calls(code: str) -> dict[str, ast.Call]:
    """The calls of a program by the name of their function."""
    found = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    return {node.func.id: node for node in found if isinstance(node.func, ast.Name)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_code_has_real_arguments_and_trains(
    name: OptimizerName, checkpointing: bool, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    accumulate = 2 if name == "flora+accumulator" else 1
    batch = 1 if name == "flora+release" else 2
    settings = PlanSettings(
        batch=batch, accumulate=accumulate, checkpointing=checkpointing, dtype=dtype, rank=8, state_dtype="int4"
    )
    code = Recipe(name, settings, row(parameters=1)).code()
    made = calls(code)
    if name != "flora+release":
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in made["TrainingArguments"].keywords}
        assert given.keys() <= {each.name for each in fields(TrainingArguments)}
        assert given["per_device_train_batch_size"] == batch
        assert given["gradient_accumulation_steps"] == accumulate
        assert given.get("gradient_checkpointing", False) is checkpointing
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tokens = torch.randint(256, (batch * accumulate, 8))
    rows = [{"input_ids": each, "labels": each} for each in tokens]
    exec(code, {"model": model, "train_dataset": rows, "loader": torch.utils.data.DataLoader(rows)})
    after = model.state_dict()
    assert {value.dtype for value in after.values()} == {getattr(torch, dtype)}
    assert all(not torch.equal(after[key].float(), before[key]) for key in before if "proj" in key)
    assert model.is_gradient_checkpointing is checkpointing


def test_the_command_ends_with_it(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And its JSON has it; the peak is that of a plan with the same settings."""
    options = ("llama", "--optimizers", "flora", "--batch", 2, "--fits")
    shown = said(capsys, *options, "1GB")
    plain = json.loads(said(capsys, *options, "1GB", "--json"))
    found = plain["fits"]["recipe"]
    assert shown.rstrip().endswith(found["code"].rstrip())
    assert {name: found[name] for name in ("optimizer", "batch", "accumulate", "checkpointing", "dtype")} == {
        "optimizer": "flora",
        "batch": 2,
        "accumulate": 1,
        "checkpointing": False,
        "dtype": "float32",
    }
    assert found["peak"] == plain["optimizers"]["flora"]["peak"]
    nothing = said(capsys, *options, "1kB", "--dtype", "bfloat16", "--checkpointing", exit_code=1)
    assert nothing.rstrip().endswith(NOTHING)
    assert said(capsys, *options, "1GB", "--fsdp", 2).rstrip()[-1] != ")"


def test_updates_have_several_sequences_where_one_is_asked_for() -> None:
    subject = planned_model(LlamaConfig(**{**SMALL, "num_hidden_layers": 1}), "llama")
    found = find_recipe(Planner(subject, PlanSettings(sequence=8, rank=8)), Size(10**9, "1 GB"))
    assert found is not None
    assert found.settings.batch * found.settings.accumulate == DEFAULT_UPDATE
