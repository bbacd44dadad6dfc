"""Rows of ``parametrize`` that ``make test`` leaves out."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def slow(*values: Any, **named: Any) -> Any:
    """A row for ``make test-slow`` only: each of its values is in another row too, or it repeats one with less."""
    return pytest.param(*values, marks=pytest.mark.slow, **named)


def paired(*columns: Iterable[Any]) -> list[Any]:
    """All products of columns, every second one slow: of three columns the others have all pairs of two values."""
    rows = product(*(list(enumerate(column)) for column in columns))
    return [
        (slow if sum(place for place, _ in row) % 2 else pytest.param)(*(value for _, value in row)) for row in rows
    ]
