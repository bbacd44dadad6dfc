"""docs/plan.md says what the code does."""

import re
import shlex
from pathlib import Path

import pytest

import floragrad
from floragrad._text import format_bytes
from floragrad.cli.plan.command import PLAN_OPTIONS
from floragrad.cli.plan.presets import MODELS
from floragrad.cli.plan.result import OPTIMIZERS, OptimizerName
from floragrad.cli.plan.verdict import WORDS
from floragrad.cli.reference import page
from tests.cli.plan.test_presets import CHECKPOINTS, MILLIONS
from tests.marks import slow

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")


def rows(heading: str, page: str = PAGE) -> list[list[str]]:
    """The cells of the table that begins with a heading."""
    lines = iter(page[page.index(f"| {heading} |") :].splitlines())
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
    assert [name for name, _ in rows("column")] == [*WORDS.values(), "sent", "peak"]


@pytest.mark.parametrize("option", sorted(set(re.findall(r"--[a-z][a-z-]+", PAGE))))
def test_every_option_that_is_named_exists(option: str) -> None:
    assert option in {"--help", *(each.flags for each in PLAN_OPTIONS.values())}


@pytest.mark.parametrize("option", [each.flags for each in PLAN_OPTIONS.values() if not each.argument])
def test_every_option_is_named(option: str) -> None:
    assert option in PAGE


def test_the_reference_is_generated_from_the_options() -> None:
    """Where it is not: ``python -m floragrad.cli.reference > docs/options.md``."""
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == page()


def test_every_command_that_is_shown_is_one() -> None:
    commands = [shlex.split(line, comments=True) for line in PAGE.splitlines() if line.startswith("floragrad ")]
    assert len(commands) >= 3
    assert {words[1] for words in commands} == {"plan"}


@pytest.mark.parametrize("names", [("flora+accumulator",), slow(("adamw",))], ids=" ".join)
def test_the_readmes_rows_are_those_of_its_command(names: tuple[OptimizerName, ...]) -> None:
    """Two of them: all would take a minute."""
    settings = {"dtype": "bfloat16", "sequence": 2048, "accumulate": 16, "optimizers": names}
    plain = floragrad.plan("llama-3-8b", **settings).optimizers
    recomputed = floragrad.plan("llama-3-8b", **settings, checkpointing=True).optimizers
    written = {cells[0]: cells[1:] for cells in rows("optimizer | parameters", README)}
    assert list(written) == list(OPTIMIZERS)
    for name in names:
        row = plain[name]
        sizes = (row.parameters, row.gradients, row.accumulation, row.optimizer_state, row.activations, row.peak)
        assert written[name] == [*map(format_bytes, sizes), format_bytes(recomputed[name].peak)]
