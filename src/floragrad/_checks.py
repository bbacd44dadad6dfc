"""Checks of options that both frameworks share, and their messages."""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import signature
from math import isfinite
from numbers import Integral, Real
from typing import Any, Final, ParamSpec, TypeVar, get_args

from floragrad.policy import EmbeddingMomentum, Projection, StateDtype

P = ParamSpec("P")
R = TypeVar("R")
Check = tuple[Callable[[Any], bool], str]
"""Predicate of a value, and a description of allowed values."""


class DefaultRank(int):
    """Default rank, distinct from the same number passed by the caller."""


DEFAULT_RANK: Final = DefaultRank(128)


def is_number(value: Any) -> bool:
    """Return True for a real number other than True and False."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_rate(value: Any) -> bool:
    """Return True for a finite number >= 0."""
    return is_number(value) and isfinite(value) and value >= 0


def is_integer(value: Any, least: int) -> bool:
    """Return True for an integer from ``least`` to 2**63 - 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) < 2**63


def is_count(value: Any) -> bool:
    """Return True for an integer >= 1."""
    return is_integer(value, 1)


def one_of(*allowed: Any) -> Check:
    """Build the check for a list of allowed values."""
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
        ValueError: With the option, the value and the allowed values.
    """
    is_valid, allowed = check
    if not is_valid(value):
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def check_contradictions(contradictions: Iterable[tuple[bool, str]]) -> None:
    """Refuse options that contradict each other.

    Args:
        contradictions: Pairs of a condition, True for a contradiction, and its message.
    """
    for contradicts, message in contradictions:
        if contradicts:
            raise ValueError(message)


def shared_contradictions(options: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """List contradictions of ``rank``, ``ratio``, ``projection`` and ``residual``."""
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
            "residual=False with projection='adaptive': an adaptive projection is not unbiased; "
            "use projection='sign' or residual=True",
        ),
    ]


def accumulator_contradictions(options: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """List contradictions of ``rank``, ``ratio`` and ``projection`` of an accumulator."""
    rank, ratio = options["rank"], options["ratio"]
    return [
        (ratio is None, "ratio=None: must be an integer >= 1; leave it out to go by rank"),
        (
            rank is not None and ratio != 1,
            f"rank={rank} and ratio={ratio}: give one of them (ratio is min(m, n) // rank, the same for every tensor)",
        ),
        (
            options["projection"] == "adaptive",
            "projection='adaptive': an adaptive projection is not unbiased, and a window's sum must be; "
            "use projection='sign'",
        ),
    ]


def check_renamed(given: Iterable[str], renamed: Mapping[str, str]) -> None:
    """Refuse keywords of flora-opt that have another name here.

    Args:
        given: Names of keywords.
        renamed: What to write, by flora-opt's keyword.

    Raises:
        TypeError: Naming the keyword and what to write.
    """
    for name in given:
        if name in renamed:
            raise TypeError(
                f"{name}= is flora-opt's keyword, and floragrad has none of that name: write {renamed[name]}"
            )


def refuse_renamed(**renamed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function with :func:`check_renamed`; its signature stays."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            check_renamed(kwargs, renamed)
            return function(*args, **kwargs)

        return checked

    return decorate


def show_plain_rank(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose signature command lines are made of: its default rank is shown as a plain number.

    LightningCLI writes defaults as YAML, which has no :class:`DefaultRank`. Not for what
    ``optax.inject_hyperparams`` calls: it passes the defaults of signatures on, and a plain rank contradicts a ratio.
    """
    given = signature(function)
    parameters = [
        each.replace(default=int(each.default)) if isinstance(each.default, DefaultRank) else each
        for each in given.parameters.values()
    ]
    function.__signature__ = given.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function
