"""docs/plan.md says what the code does."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from floragrad.planning.command import plan
from floragrad.planning.presets import MODELS
from floragrad.planning.result import OPTIMIZERS
from floragrad.planning.verdict import WORDS
from tests.planning.test_presets import CHECKPOINTS, MILLIONS

PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
RENAMED = {"--json": "as_json"}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table that begins with a heading."""
    lines = iter(PAGE[PAGE.index(f"| {heading} |") :].splitlines())
    next(lines), next(lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in iter(lambda: next(lines, ""), "")]


def test_the_presets_are_those_that_there_are() -> None:
    table = rows("preset")
    assert [(name, source) for name, _, source in table] == [(name, each.source) for name, each in MODELS.items()]
    for name, parameters, _ in table:
        count = int(parameters.replace(",", ""))
        assert count == CHECKPOINTS.get(name, count)
        assert round(count / 1e6, 2) == MILLIONS.get(name, round(count / 1e6, 2))


def test_the_optimizers_are_those_that_there_are() -> None:
    assert [name for name, _ in rows("name")] == list(OPTIMIZERS)


def test_the_columns_are_those_of_the_table() -> None:
    assert [name for name, _ in rows("column")] == [*WORDS.values(), "peak"]


@pytest.mark.parametrize("option", sorted(set(re.findall(r"--[a-z][a-z-]+", PAGE))))
def test_every_option_that_is_named_exists(option: str) -> None:
    names = inspect.signature(plan).parameters
    assert RENAMED.get(option, option[2:].replace("-", "_")) in names or option == "--help"


@pytest.mark.parametrize("option", sorted(inspect.signature(plan).parameters.keys() - {"model"}))
def test_every_option_is_named(option: str) -> None:
    names = {after: before for before, after in RENAMED.items()}
    assert names.get(option, f"--{option.replace('_', '-')}") in PAGE


def test_every_command_that_is_shown_is_one() -> None:
    commands = [shlex.split(line, comments=True) for line in PAGE.splitlines() if line.startswith("floragrad ")]
    assert len(commands) >= 3
    assert {words[1] for words in commands} == {"plan"}
