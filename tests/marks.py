"""Rows of ``parametrize`` that ``make test`` leaves out."""

from typing import Any

import pytest


def slow(*values: Any, **named: Any) -> Any:
    """A row for ``make test-slow`` only: each of its values is in another row too, or it repeats one with less."""
    return pytest.param(*values, marks=pytest.mark.slow, **named)
