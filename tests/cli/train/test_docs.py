"""docs/training.md says what the code does."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from floragrad.cli.compare.command import COMPARE_OPTIONS
from floragrad.cli.methods import DEFAULT_METHODS, EMBEDDING_LR, METHODS
from floragrad.cli.presets import FINE_TUNING_LEARNING_RATE, PRESETS
from floragrad.cli.train.command import TRAIN_OPTIONS
from tests.cli.train.support import fast_config, newest, run

PAGE = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")

TORCHRUNS = {"--nproc-per-node"}
"""Options of torchrun's."""


def rows(heading: str) -> list[list[str]]:
    """The cells of the table that begins with a heading."""
    lines = iter(PAGE[PAGE.index(f"| {heading} |") :].splitlines())
    next(lines), next(lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in iter(lambda: next(lines, ""), "")]


def test_the_sizes_are_those_of_the_presets() -> None:
    expected = [[name, *(f"{value:,}" for value in vars(preset).values())] for name, preset in PRESETS.items()]
    assert rows("size") == expected


def test_the_learning_rates_are_the_best_of_the_table() -> None:
    tried = [(name, float(lr), float(embedding), float(loss)) for name, lr, embedding, loss in rows("optimizer")]
    for name in DEFAULT_METHODS:
        best = min((row for row in tried if row[0] == name), key=lambda row: row[-1])
        assert best[1:3] == (METHODS[name].lr, EMBEDDING_LR)
    assert f"{FINE_TUNING_LEARNING_RATE:.0e}".replace("e-05", "e-5") in PAGE


@pytest.mark.parametrize("option", sorted(set(re.findall(r"--[a-z][a-z-]+", PAGE)) - TORCHRUNS))
def test_every_option_that_is_named_exists(option: str) -> None:
    declared = [*TRAIN_OPTIONS.values(), *COMPARE_OPTIONS.values()]
    assert option in {"--help", *(name for each in declared for name in each.flags.split("/"))}


def test_every_command_that_is_shown_is_one() -> None:
    commands = [shlex.split(line, comments=True) for line in PAGE.splitlines() if line.startswith("floragrad ")]
    assert len(commands) >= 3
    assert {words[1] for words in commands} == {"train", "compare"}


def test_the_snippet_loads_a_run(texts: Path, tmp_path: Path) -> None:
    folder = run(fast_config(texts, steps=1), tmp_path / "run")
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(snippet, names)
    model, tokenizer = names["load"](str(folder.path), 1)
    assert model.config.vocab_size == len(tokenizer) == 300
    assert newest(folder).name == "checkpoint-1"
    tokens = list(range(5))
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits.numpy()
    # Logits are about one here; float32 sums of 192 products in another order differ by some 192 roundings.
    np.testing.assert_allclose(
        names["load_with_jax"](str(folder.path), 1)(np.array([tokens])), logits, atol=192 * 1.2e-7
    )
