import random
from collections.abc import Callable

import pytest

from floragrad.cli.plan.limits import MOST_EXAMPLES, MOST_TOKENS, Limits, find_limits, has_rank, largest_that_fits
from floragrad.cli.plan.models import find_model
from floragrad.cli.plan.result import OptimizerName, PlanSettings


def by_trying_all(peak: Callable[[int], int], budget: int, most: int) -> int:
    return max((number for number in range(1, most + 1) if peak(number) <= budget), default=0)


@pytest.mark.parametrize("seed", range(100))
def test_it_is_the_largest(seed: int) -> None:
    """Against trying every number, for peaks with slopes, curvature, kinks and plateaus."""
    draw = random.Random(seed)
    most = draw.choice([1, 2, 7, 500])
    kink, start = draw.randint(1, most), draw.randint(1, most)
    base, slope, bend, more = (draw.choice([0, draw.randint(0, 100)]) for _ in range(4))
    tried: list[int] = []

    def peak(number: int) -> int:
        tried.append(number)
        return max(5000, 1000 + base * 10 + slope * number + bend * number**2 + more * max(0, number - kink))

    budget = draw.randint(0, 20_000)
    found = largest_that_fits(peak, budget, start, most)
    assert len(tried) == len(set(tried)), "no peak is asked for twice"
    assert all(1 <= number <= most for number in tried)
    assert found == by_trying_all(peak, budget, most)


def test_a_straight_line_takes_five_peaks_and_not_twenty() -> None:
    tried: list[int] = []

    def peak(batch: int) -> int:
        tried.append(batch)
        return 5 * 10**9 + batch * 10**8

    assert largest_that_fits(peak, 24 * 10**9, 1, 2**20) == 190
    assert len(tried) <= 5


def peak(settings: PlanSettings) -> int:
    """A made-up step: batch and sequence multiply, and rank comes on top."""
    return 1000 + 2 * settings.batch * settings.sequence + 10 * settings.rank


@pytest.mark.parametrize(
    ("name", "budget", "expected"),
    [
        # 1000 + 2·1·100 + 10·50 = 1700 is what was asked for.
        ("flora", 1700, Limits(batch=1, sequence=100, rank=50)),
        ("flora", 2500, Limits(batch=5, sequence=500, rank=130)),
        ("flora", 1699, Limits(batch=0, sequence=99, rank=49)),
        ("flora", 1000, Limits(batch=0, sequence=0, rank=0)),
        ("adamw", 2500, Limits(batch=5, sequence=500, rank=None)),
        ("lora", 10**9, Limits(batch=MOST_EXAMPLES, sequence=1024, rank=768)),
        ("flora", 10**9, Limits(batch=MOST_EXAMPLES, sequence=1024, rank=384)),
    ],
)
def test_each_limit_leaves_all_else_as_it_was(name: OptimizerName, budget: int, expected: Limits) -> None:
    settings = PlanSettings(batch=1, sequence=100, rank=50)
    assert find_limits(name, find_model("gpt2"), settings, budget, peak) == expected


def test_a_model_without_a_longest_sequence_has_a_bound_all_the_same() -> None:
    assert find_limits("adamw", find_model("t5-small"), PlanSettings(), 10**9, peak).sequence == MOST_TOKENS


def test_images_have_no_sequence() -> None:
    assert find_limits("adamw", find_model("vit-b-16"), PlanSettings(), 10**9, peak).sequence is None


@pytest.mark.parametrize(
    ("name", "ratio", "expected"),
    [
        ("adamw", None, False),
        ("lora", 4, True),
        ("galore", 4, True),
        ("flora", None, True),
        ("flora+release", 4, False),
    ],
)
def test_a_ratio_stands_for_floras_rank_alone(name: OptimizerName, ratio: int | None, expected: bool) -> None:
    assert has_rank(name, PlanSettings(ratio=ratio)) is expected
