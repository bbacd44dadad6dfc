"""Benchmarks set threads and the environment for their whole process, as scripts do."""

import pytest


@pytest.fixture(autouse=True)
def _same_process_afterwards(restored_process: None) -> None:
    """Undo what a benchmark or a training run sets."""
