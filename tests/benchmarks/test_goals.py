"""The table of goals is computed from the results, and says what is missing."""

import pytest

from benchmarks.step.goals import GOALS, goal_cells, verdicts
from benchmarks.step.optimizers import (
    ADAPTIVE,
    FLOAT32,
    FLORA_OPT,
    HF_ADAFACTOR,
    INT8,
    RANKS,
    TORCH_ADAFACTOR,
    at_rank,
)
from tests.benchmarks.results import LARGEST_BYTES, made_up_results, made_up_run, wanted

FIGURES = {
    INT8: {"ratio": 1.1, "peak_bytes": LARGEST_BYTES // 10},
    FLOAT32: {"ratio": 1.01},
    FLORA_OPT: {"ratio": 12.0},
    TORCH_ADAFACTOR: {"ratio": 4.0},
    HF_ADAFACTOR: {"ratio": 5.0},
    at_rank(INT8, RANKS[0]): {"ratio": 1.0},
    at_rank(INT8, RANKS[-1]): {"ratio": 1.2},
    f"{INT8}, eager": {"ratio": 2.5, "peak_bytes": LARGEST_BYTES // 4},
    f"{INT8}, short epochs": {"epoch_ratio": 1.25},
    f"{ADAPTIVE}, short epochs": {"epoch_ratio": 2.0},
}


def test_every_goal_from_given_numbers() -> None:
    found = verdicts(made_up_results(**FIGURES))
    expected = [1.1 / 12, 1.1 / 4, 1.1, 1.01, 1.2, 2.5, 0.25, 0.1, 1.25, 2.0, 1.01]
    assert [each.measured for each in found] == pytest.approx(expected)
    assert [each.goal.figure for each in found if each.words == "not met"] == [
        "the same with float32 state",
        "step time at rank 256 over rank 16",
    ]


def test_a_full_run_measures_every_goal() -> None:
    assert all(each.measured is not None for each in verdicts(made_up_results()))


def test_a_peer_that_failed_is_why_a_goal_was_not_measured() -> None:
    changes = {FLORA_OPT: {"ratio": None, "trouble": "ImportError: no accelerate"}}
    first = verdicts(made_up_results(**changes))[0]
    assert first.measured is None
    assert "flora-opt" in first.words
    assert "ImportError: no accelerate" in first.words


def test_a_partial_run_says_what_is_missing() -> None:
    runs = [made_up_run(run) for run in wanted(parts=["epochs"]).runs()]
    found = verdicts({"runs": runs})
    assert [each.measured is not None for each in found].count(True) == 3
    assert "no tables" in found[0].words
    assert all(each.words for each in found)


def test_the_tables_of_one_thread_do_not_count() -> None:
    results = made_up_results(**FIGURES)
    for run in results["runs"]:
        if run["threads"] == 1:
            run["rows"] = []
    assert all(each.measured is not None for each in verdicts(results))


def test_cells_show_a_figure_to_the_digits_of_its_goal() -> None:
    cells = goal_cells(made_up_results(**FIGURES))
    assert len(cells) == 1 + len(GOALS)
    assert cells[1] == ("step time against flora-opt with momentum", "≤ 0.100", "0.092", "met")
    assert {len(row) for row in cells} == {4}
