import random
from collections.abc import Callable

import pytest

from floragrad.planning.limits import largest_that_fits


def by_trying_all(peak: Callable[[int], int], room: int, most: int) -> int:
    return max((number for number in range(1, most + 1) if peak(number) <= room), default=0)


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

    room = draw.randint(0, 20_000)
    found = largest_that_fits(peak, room, start, most)
    assert len(tried) == len(set(tried)), "no peak is asked for twice"
    assert all(1 <= number <= most for number in tried)
    assert found == by_trying_all(peak, room, most)


def test_a_straight_line_takes_five_peaks_and_not_twenty() -> None:
    tried: list[int] = []

    def peak(batch: int) -> int:
        tried.append(batch)
        return 5 * 10**9 + batch * 10**8

    assert largest_that_fits(peak, 24 * 10**9, 1, 2**20) == 190
    assert len(tried) <= 5
