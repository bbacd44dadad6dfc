"""Turns are interleaved, ratios are taken within rounds, and pages are whole."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Timed


def test_every_row_runs_once_a_round_in_changing_order() -> None:
    log: list[str] = []
    rows = {name: Timed(lambda name=name: log.append(name), lambda: log.append("before")) for name in "abc"}
    harness.interleave(rows.values(), rounds=20, warm_up=2, pause=0)
    assert log[::2] == ["before"] * len(rows) * 22
    rounds = ["".join(log[1::2][start : start + 3]) for start in range(0, 66, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    assert {len(row.seconds) for row in rows.values()} == {20}


def test_a_row_that_fails_leaves_and_the_others_go_on() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise ValueError(f"the fourth\ncall in {sys.prefix}/lib")

    bad, good = Timed(fail), Timed(lambda: None)
    harness.interleave([bad, good], rounds=6, warm_up=1, pause=0)
    assert (len(bad.seconds), bad.error, len(calls)) == (2, "ValueError: the fourth call in …/lib", 4)
    assert (len(good.seconds), good.error) == (6, "")


def test_a_slow_round_slows_both() -> None:
    found = harness.ratio([2.0, 20.0, 2.2, 1.8, 2.0], [1.0, 10.0, 1.0, 1.0, 1.0])
    assert found == (2.0, 2.0, 2.0)
    assert str(found) == "2.00 (2.00 – 2.00)"


@pytest.mark.parametrize(
    ("own", "expected"),
    [([], None), ([3.0], (3, 3, 3)), ([1.0, 2.0], (1.5, 1.25, 1.75)), ([4.0, 2.0, 5.0, 1.0, 3.0], (3, 2, 4))],
)
def test_quartiles_stay_within_the_values(own: list[float], expected: tuple[float, ...] | None) -> None:
    assert harness.ratio(own, [1.0] * 5) == expected


def test_a_table_keeps_its_columns() -> None:
    assert harness.table(("a", "b"), [(1, "x | y")]) == ["| a | b |", "| --- | --- |", "| 1 | x \\| y |"]


def test_the_page_and_the_raw_results_are_written(tmp_path: Path) -> None:
    given = argparse.Namespace(out=tmp_path / "pages", raw=tmp_path / "raw")
    harness.publish(given, "name", ["# Title", *harness.environment(("torch", "no-such-package"))], {"a": [1.5]})
    page = (given.out / "name.md").read_text()
    assert page.startswith("# Title\n- `python -m benchmarks.")
    assert ", torch 2" in page
    assert "no-such-package" not in page
    assert json.loads((given.raw / "name.json").read_text()) == {"a": [1.5]}
