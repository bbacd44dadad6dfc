"""The groups of processes that all tests here share."""

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.world import World

Worlds = Callable[[int], World]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests here in one process of pytest-xdist, so that the groups are started once."""
    for item in items:
        if "distributed" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("distributed"))


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """Groups of processes by their size, started when they are asked for."""
    started: dict[int, World] = {}

    def world(size: int) -> World:
        return started.setdefault(size, World(size))

    yield world
    for each in started.values():
        each.close()
