"""Ratios are within a round; epochs are told from ordinary steps by their number."""

import pytest

from benchmarks.step.batches import Subject
from benchmarks.step.figures import epoch_row, quartiles, ratio_figures, row
from benchmarks.step.measure import WARM_UP, Measured
from benchmarks.step.optimizers import ALL, EPOCHS, FUSED
from benchmarks.step.shapes import LAYERS


def test_a_slow_round_slows_both() -> None:
    found = ratio_figures([2.0, 20.0, 2.2, 1.8, 2.0], [1.0, 10.0, 1.0, 1.0, 1.0])
    assert found["ratio"] == 2.0
    assert found["quartiles"] == [2.0, 2.0]
    assert found["median_ms"] == 2000


def test_quartiles_stay_within_the_values() -> None:
    assert quartiles([3.0]) == [3.0, 3.0]
    assert quartiles([1.0, 2.0]) == [1.25, 1.75]
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]


def test_one_that_failed_has_its_error_and_no_figures() -> None:
    found = row(Measured(Subject(FUSED, LAYERS), trouble="RuntimeError: no device"))
    assert found["trouble"] == "RuntimeError: no device"
    assert found["steps"] == 0
    assert "ratio" not in found


@pytest.mark.parametrize("name", EPOCHS)
def test_epochs(name: str) -> None:
    opens = ALL[name].opens
    assert opens is not None
    steps = range(WARM_UP + 1, WARM_UP + 21)
    seconds = [3.0 if opens(step) else 1.0 for step in steps]
    found = epoch_row(Measured(Subject(name, LAYERS), seconds=seconds, reference_seconds=[1.0] * 20))
    assert (found["epochs"], found["epoch_ratio"], found["epoch_quartiles"]) == (5, 3.0, [3.0, 3.0])
    assert (found["epoch_ms"], found["ordinary_ms"]) == (3000, 1000)


def test_no_epoch_in_the_measured_steps() -> None:
    name = next(iter(EPOCHS))
    found = epoch_row(Measured(Subject(name, LAYERS), seconds=[1.0], reference_seconds=[1.0], trouble="left"))
    assert "epoch_ratio" not in found or found["epochs"] == 1
    assert epoch_row(Measured(Subject(name, LAYERS), trouble="left"))["trouble"] == "left"
