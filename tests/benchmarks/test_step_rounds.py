"""Rounds are told apart by the reference's own time."""

from benchmarks.step.optimizers import INT8
from benchmarks.step.plan import Run
from benchmarks.step_rounds import border, by_kind, cells
from tests.benchmarks.results import made_up_run, wanted

SLOW, FAST = 0.04, 0.02


def tables() -> Run:
    return wanted().runs()[0]


def test_a_machine_that_changes_its_speed() -> None:
    """Where all of it slows down alike, both kinds have the same ratio; an outlier is no kind of its own."""
    reference = [SLOW] * 6 + [FAST] * 14
    alike = {"seconds": [2 * each for each in reference], "reference_seconds": reference}
    run = made_up_run(tables(), **{row["name"]: alike for row in made_up_run(tables())["rows"]})
    assert FAST < border(run) < SLOW
    assert {row[1:] for row in cells(run)[1:]} == {("6", "2.00", "14", "2.00")}
    run["rows"][0]["reference_seconds"] = [*reference[:-1], 10 * SLOW]
    assert FAST < border(run) < SLOW


def test_what_does_not_slow_down_has_two_ratios() -> None:
    row = {"seconds": [0.02] * 4, "reference_seconds": [SLOW, FAST, SLOW, FAST]}
    assert by_kind(row, 0.03) == ([0.5, 0.5], [1.0, 1.0])


def test_one_that_took_no_part_is_listed() -> None:
    run = made_up_run(tables(), **{INT8: {"seconds": [], "reference_seconds": []}})
    assert (INT8, "0", "—", "0", "—") in cells(run)
