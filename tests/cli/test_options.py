"""One declaration makes an option of the command line, its checks and its words."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from floragrad.cli.errors import UserError
from floragrad.cli.options import check_values, command, option, options_of, take

PANEL = "Panel"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One field of each kind."""

    name: str = option("A name.", PANEL, argument=True, metavar="NAME")
    count: int = option("How many.", PANEL, default=1, minimum=1, maximum=9)
    rate: float | None = option("How fast.", PANEL, default=None, above=0)
    dtype: Literal["float32", "int8"] = option("Stored as.", PANEL, default="int8", choices=("float32", "int8"))
    files: tuple[str, ...] = option("Several.", PANEL, default=(), metavar="FILE")
    seeds: tuple[int, ...] | None = option("A list.", PANEL, default=None, metavar="SEED,…", example="0,1")
    out: Path | None = option("Where to.", PANEL, default=None, metavar="FOLDER")
    fast: bool = option("Faster.", PANEL, default=False)
    keep: bool = option("Keep it.", PANEL, default=True, negatable=True)
    internal: str = "not an option"


OPTIONS = options_of(Settings)


def given(*arguments: str) -> dict[str, Any]:
    """The values that a command gets."""
    app, seen = typer.Typer(), []

    def run(values: dict[str, Any]) -> None:
        seen.append(values)

    command(app, OPTIONS, help="Run.", epilog="")(run)
    result = CliRunner().invoke(app, arguments, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return seen[0]


def test_a_command_gets_what_was_given_alone() -> None:
    assert given("x") == {"name": "x"}
    assert take(Settings, given("x")) == Settings(name="x")


def test_every_kind_of_value_is_read() -> None:
    words = "x --count 3 --rate 1e-3 --dtype float32 --files a --files b --seeds 1,2 --out c --fast --no-keep"
    assert take(Settings, given(*words.split())) == Settings(
        name="x",
        count=3,
        rate=1e-3,
        dtype="float32",
        files=("a", "b"),
        seeds=(1, 2),
        out=Path("c"),
        fast=True,
        keep=False,
    )


@pytest.mark.parametrize("words", ["x --count three", "x --rate high", "x --internal y", ""])
def test_other_words_are_refused_by_the_parser(words: str) -> None:
    with pytest.raises(Exception, match=r"whole number|not a number|[Nn]o such option|Missing (argument|parameter)"):
        given(*words.split())


def test_a_list_that_cannot_be_read_is_refused_with_an_example() -> None:
    with pytest.raises(UserError, match="--seeds '1;2' cannot be read: give a list with commas, like 0,1"):
        given("x", "--seeds", "1;2")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"count": 0}, "--count is 0: give a whole number of at least 1 and at most 9"),
        ({"count": 10}, "--count is 10: give a whole number of at least 1 and at most 9"),
        ({"rate": 0.0}, "--rate is 0.0: give a number above 0"),
        ({"dtype": "int2"}, "--dtype 'int2' is unknown: choose one of float32, int8"),
    ],
)
def test_values_out_of_range_are_refused(value: dict[str, Any], message: str) -> None:
    check_values(OPTIONS, {"count": 9, "rate": None, "dtype": "int8"})
    with pytest.raises(UserError) as refused:
        check_values(OPTIONS, value)
    assert str(refused.value) == message


def test_defaults_are_said_in_words() -> None:
    words = {name: each.words for name, each in OPTIONS.items()}
    assert words == {**dict.fromkeys(OPTIONS, ""), "count": "1", "dtype": "int8", "keep": "keep"}
