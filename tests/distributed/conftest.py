"""The groups of processes that all tests here share."""

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.world import World

Worlds = Callable[[int], World]


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """Groups of processes by their size, started when they are asked for."""
    started: dict[int, World] = {}

    def world(size: int) -> World:
        return started.setdefault(size, World(size))

    yield world
    for each in started.values():
        each.close()
