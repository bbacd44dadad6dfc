"""Checks of options that both frameworks have, and what they say."""

from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from numbers import Integral, Real
from typing import Any, Final, get_args

from floragrad.policy import EmbeddingMomentum, Projection, StateDtype

Check = tuple[Callable[[Any], bool], str]
"""Whether a value is allowed, and what is, in words."""


class DefaultRank(int):
    """The default rank, told apart from the same number given by the caller."""


DEFAULT_RANK: Final = DefaultRank(128)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, which True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_rate(value: Any) -> bool:
    """Whether a value is a finite number from 0 up."""
    return is_number(value) and isfinite(value) and value >= 0


def is_integer(value: Any, least: int) -> bool:
    """Whether a value is an integer from ``least`` to 2**63 - 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) < 2**63


def is_count(value: Any) -> bool:
    """Whether a value is an integer from 1 up."""
    return is_integer(value, 1)


def one_of(*allowed: Any) -> Check:
    """The check for a few values."""
    return (
        lambda value: any(value is each or (isinstance(value, str) and value == each) for each in allowed),
        "one of " + ", ".join(map(repr, allowed)),
    )


FLAG: Final = one_of(True, False)

SHARED_CHECKS: Final[dict[str, Check]] = {
    "rank": (lambda value: value is None or is_count(value), "an integer >= 1"),
    "ratio": (lambda value: value is None or is_count(value), "an integer >= 1, or None to go by rank"),
    "kappa": (is_count, "an integer >= 1"),
    "projection": one_of(*get_args(Projection)),
    "residual": one_of(None, True, False),
    "embedding_momentum": one_of(*get_args(EmbeddingMomentum)),
    "state_dtype": one_of(*get_args(StateDtype)),
}


def check_value(name: str, value: Any, check: Check) -> None:
    """Refuse a wrong value of one option.

    Raises:
        ValueError: Naming the option, the value and what is allowed.
    """
    is_valid, allowed = check
    if not is_valid(value):
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def check_contradictions(contradictions: Iterable[tuple[bool, str]]) -> None:
    """Refuse options that contradict each other.

    Args:
        contradictions: Whether each one is there, and what to say then.
    """
    for contradicts, message in contradictions:
        if contradicts:
            raise ValueError(message)


def shared_contradictions(options: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """What ``rank``, ``ratio``, ``projection`` and ``residual`` may not say together."""
    rank, ratio = options["rank"], options["ratio"]
    return [
        (
            rank is not None and ratio is not None,
            f"rank={rank} and ratio={ratio}: give one of them (ratio is min(m, n) // rank, the same for every tensor)",
        ),
        (rank is None and ratio is None, "rank=None and ratio=None: give one of them"),
        (
            options["projection"] == "gaussian" and options["residual"] is True,
            "residual=True with projection='gaussian': its rows are not orthogonal, so there is no residual; "
            "use projection='sign' or residual=False",
        ),
        (
            options["projection"] == "adaptive" and options["residual"] is False,
            "residual=False with projection='adaptive': a learnt projection is not unbiased; "
            "use projection='sign' or residual=True",
        ),
    ]


def accumulator_contradictions(options: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """What ``rank``, ``ratio`` and ``projection`` of an accumulator may not say."""
    rank, ratio = options["rank"], options["ratio"]
    return [
        (ratio is None, "ratio=None: must be an integer >= 1; leave it out to go by rank"),
        (
            rank is not None and ratio != 1,
            f"rank={rank} and ratio={ratio}: give one of them (ratio is min(m, n) // rank, the same for every tensor)",
        ),
        (
            options["projection"] == "adaptive",
            "projection='adaptive': a learnt projection is not unbiased, and a window's sum must be; "
            "use projection='sign'",
        ),
    ]
