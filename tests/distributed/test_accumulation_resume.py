"""Windows of several processes, stopped and taken up again: by the same ranks, or by another number of them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.conftest import Worlds
from tests.torch.accumulation_cases import STEPS
from tests.torch.accumulation_resume import Run


class RankRun(Run):
    """A run whose micro-batches are a rank's own."""

    def go_on(self, rank: int, first: int, last: int) -> None:
        self.go(first + 1000 * rank, last + 1000 * rank)


def run(**options: Any) -> RankRun:
    return RankRun(dtype=torch.float32, **options)


def interrupted(rank: int, stop: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Two windows without a stop, and with one after ``stop`` micro-batches."""
    whole, first, second = run(**options), run(**options), run(**options)
    whole.go_on(rank, 0, 2 * STEPS)
    first.go_on(rank, 0, stop)
    second.load(copy.deepcopy(first.state()))
    second.go_on(rank, stop, 2 * STEPS)
    return whole.result(), second.result()


@pytest.mark.parametrize("options", [{}, {"ratio": 2}, {"optimizer": "adamw"}], ids=str)
@pytest.mark.parametrize("stop", [STEPS - 1, STEPS, STEPS + 2])
def test_every_rank_takes_up_its_own_window(worlds: Worlds, stop: int, options: dict[str, Any]) -> None:
    results = worlds(2).run(interrupted, stop, options)
    for whole, resumed in results:
        assert torch.equal(whole, resumed)
        assert torch.equal(whole, results[0][0])


def saved_after(rank: int, count: int) -> dict[str, Any]:
    made = run()
    made.go_on(rank, 0, count)
    return made.state()


def taken_up(rank: int, state: dict[str, Any]) -> Tensor | str:
    made = run()
    try:
        made.load(state)
    except ValueError as error:
        return str(error)
    made.go_on(rank, STEPS, 2 * STEPS)
    return made.result()


def test_between_windows_any_number_of_ranks_goes_on(worlds: Worlds) -> None:
    first, second = worlds(2).run(saved_after, STEPS)
    windows = [each["accumulator"] for each in (first, second)]
    assert windows[0]["sketches"].keys() == windows[1]["sketches"].keys() != set()
    for index, sizes in windows[0]["sketches"].items():
        assert torch.equal(sizes["col_var"], windows[1]["sketches"][index]["col_var"])
    results = worlds(4).run(taken_up, first)
    assert all(torch.equal(each, results[0]) for each in results)
    single = taken_up(0, first)
    assert isinstance(single, Tensor)
    assert not torch.equal(single, results[0]), "which had other micro-batches"


def refused(rank: int, states: list[dict[str, Any]]) -> str:
    """Loading another rank's window."""
    try:
        run().load(states[1 - rank])
    except ValueError as error:
        return str(error)
    return "nothing was noticed"


def test_inside_a_window_only_the_rank_that_saved_it_goes_on(worlds: Worlds) -> None:
    states = worlds(2).run(saved_after, STEPS + 1)
    first, second = worlds(2).run(refused, states)
    assert "the saved window is rank 1's of 2, this is rank 0 of 2" in first
    assert "the saved window is rank 0's of 2, this is rank 1 of 2" in second
    said = taken_up(0, states[0])
    assert isinstance(said, str)
    assert "the saved window is rank 0's of 2, this is rank 0 of 1" in said
