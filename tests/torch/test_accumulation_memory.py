"""What lives during a window of a 12-layer Llama, measured by a dispatch mode."""

import pytest

from benchmarks.accumulation_memory import Job, Measured, measure
from tests.marks import slow

OURS = ("sketches", "gradients", "temporaries")


def peaks(options: dict | None) -> tuple[Measured, int]:
    job = Job(hidden=128, layers=12, vocabulary=1024, steps=2, tokens=40, options=options)
    measured = measure(job)
    return measured, measured.timeline.peak_of(*OURS)


@pytest.fixture(scope="module")
def exact() -> int:
    return peaks(None)[1]


@pytest.mark.parametrize("options", [{}, slow({"clip": False})], ids=str)
def test_release_never_holds_two_gradients(options: dict, exact: int) -> None:
    """Sketches as predicted, and three times the largest tensor for a gradient and its step's temporaries."""
    measured, peak = peaks(options)
    assert measured.timeline.peak_of("sketches") == measured.sketch_bytes
    assert measured.sketch_bytes < measured.gradient_bytes / 6
    assert peak <= measured.sketch_bytes + 3 * measured.largest
    assert measured.gradient_bytes <= exact <= measured.gradient_bytes + 3 * measured.largest


def test_materialise_holds_the_gradients_at_the_end_only(exact: int) -> None:
    measured, peak = peaks({"release": False})
    assert measured.gradient_bytes < peak <= measured.sketch_bytes + measured.gradient_bytes + 3 * measured.largest


def test_one_step_holds_nothing() -> None:
    """Plain gradient release."""
    job = Job(hidden=128, layers=12, vocabulary=1024, steps=1, tokens=40, options={})
    measured = measure(job)
    assert measured.sketch_bytes == measured.timeline.peak_of("sketches") == 0
    assert measured.timeline.peak_of(*OURS) <= 3 * measured.largest
