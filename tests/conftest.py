"""What every test process has in common."""

import gc
import os
import signal
import sys
import warnings
from collections.abc import Iterator

import pytest

# One thread: pytest-xdist has one process on each core. The processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# Triton's kernels run in its interpreter, on CPU tensors; it has to be known before anything imports triton.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Started in the background by a shell, pytest would ignore Ctrl-C, and so would the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

SLOWEST = ["test_torchrun", "train", "distributed", "jax", "compare", "plan", "integrations", "benchmarks"]
"""Files and folders that take longest. They come first, so that every core is busy to the end under --dist loadfile."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        names = item.path.stem, item.path.parent.name
        return next((place for place, name in enumerate(SLOWEST) if name in names), len(SLOWEST))

    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """Exempt from garbage collection what is imported by now, and let accelerate not collect the rest after each run.

    Either takes as long as a short run itself.
    """
    gc.collect()
    gc.freeze()
    if memory := sys.modules.get("accelerate.utils.memory"):
        memory.clear_device_cache = lambda garbage_collection=False: None  # type: ignore[attr-defined]


def pytest_sessionfinish() -> None:
    """Let the interpreter free at its exit what JAX's bindings would report as leaked."""
    gc.unfreeze()


@pytest.fixture(scope="module")
def unoptimized() -> Iterator[None]:
    """JAX's programs without LLVM's optimizations, for tests of behaviour: these take longer than the tests.

    Numbers are compared with the oracle, and in every bit of their storage, in optimized code.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def restored_process() -> Iterator[None]:
    """Restore the environment, torch's threads and its choice of algorithms, which commands set and never undo.

    A test that compares bits with another process would run with another number of threads than that process.
    """
    import torch

    environment = dict(os.environ)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    os.environ.clear()
    os.environ.update(environment)
