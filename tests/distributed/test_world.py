"""The processes that the other tests here rely on."""

import pytest
import torch

from tests.distributed.conftest import Worlds


def rank_sum(rank: int, factor: int) -> float:
    """Sum the ranks over the group."""
    total = torch.tensor(float(rank * factor))
    torch.distributed.all_reduce(total)
    return total.item()


def fails_on_the_last(rank: int) -> None:
    """Raise on one rank while the others wait for it."""
    if rank == torch.distributed.get_world_size() - 1:
        raise ValueError("this one")
    torch.distributed.barrier()


def test_every_rank_answers(worlds: Worlds) -> None:
    """A function runs on all ranks of one group, one call after the other."""
    assert worlds(2).run(rank_sum, 1) == [1.0, 1.0]
    assert worlds(2).run(rank_sum, 10) == [10.0, 10.0]


def test_an_error_of_one_rank_is_raised_at_once(worlds: Worlds) -> None:
    """The other ranks wait in a collective; their timeout is not waited for."""
    with pytest.raises(AssertionError, match="this one"):
        worlds(2).run(fails_on_the_last)
    assert worlds(2).run(rank_sum, 1) == [1.0, 1.0]
