"""A plan from the command line sets what a training run sets: the same is undone."""

from tests.train.conftest import _same_process_afterwards

__all__ = ["_same_process_afterwards"]
