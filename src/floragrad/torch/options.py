"""The options of a parameter group: their checks, and what follows from them."""

from collections.abc import Callable
from math import isfinite
from numbers import Integral, Real
from typing import Any, Final, get_args

import torch

from floragrad.policy import EmbeddingMomentum, Kind, Projection, StateDtype, TensorPlan, plan_tensor


class _DefaultRank(int):
    """The default rank, told apart from the same number given by the caller."""


DEFAULT_RANK: Final = _DefaultRank(128)

LAYOUT_OPTIONS: Final = (
    "rank",
    "ratio",
    "kappa",
    "seed",
    "projection",
    "residual",
    "embedding_momentum",
    "state_dtype",
    "factorize_second_moment",
    "kind",
)
"""What fixes the shape and the basis of the state: a checkpoint with another value cannot be read."""

_PLAN_OPTIONS: Final = (
    "rank",
    "ratio",
    "projection",
    "beta1",
    "factorize_second_moment",
    "embedding_momentum",
    "state_dtype",
    "kind",
)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) < 2**63


def is_count(value: Any) -> bool:
    """Whether a value is an integer from 1 up."""
    return _is_integer(value, 1)


def _is_lr(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return value is None or (_is_number(value) and isfinite(value) and value >= 0)


def _is_eps(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_number(v) and v >= 0 for v in value)


def _one_of(*allowed: Any) -> tuple[Callable[[Any], bool], str]:
    return (
        lambda value: any(value is each or (isinstance(value, str) and value == each) for each in allowed),
        "one of " + ", ".join(map(repr, allowed)),
    )


_FLAG: Final = _one_of(True, False)

_CHECKS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "lr": (_is_lr, "a number >= 0, or None with relative_step=True; a Tensor lr must be 1-element"),
    "rank": (lambda value: value is None or is_count(value), "an integer >= 1"),
    "ratio": (lambda value: value is None or is_count(value), "an integer >= 1, or None to go by rank"),
    "kappa": (is_count, "an integer >= 1"),
    "eps": (_is_eps, "two numbers >= 0: (added to squared gradients, least parameter scale)"),
    "clip_threshold": (lambda value: _is_number(value) and value > 0, "a number > 0; inf does not clip"),
    "decay_rate": (lambda value: _is_number(value) and value <= 0, "a number <= 0"),
    "beta1": (
        lambda value: value is None or (_is_number(value) and 0 <= value < 1),
        "a number in [0, 1), or None for no momentum",
    ),
    "weight_decay": (lambda value: _is_number(value) and value >= 0, "a number >= 0"),
    "scale_parameter": _FLAG,
    "relative_step": _FLAG,
    "warmup_init": _FLAG,
    "factorize_second_moment": _FLAG,
    "seed": (lambda value: _is_integer(value, 0), "an integer from 0 to 2**63 - 1"),
    "projection": _one_of(*get_args(Projection)),
    "residual": _one_of(None, True, False),
    "embedding_momentum": _one_of(*get_args(EmbeddingMomentum)),
    "state_dtype": _one_of(*get_args(StateDtype)),
    "stochastic_rounding": _FLAG,
    "compile": _FLAG,
    "kind": _one_of(None, *get_args(Kind)),
}


def check_option(name: str, value: Any) -> None:
    """Refuse a wrong value of one option.

    Raises:
        ValueError: Naming the option, the value and what is allowed.
    """
    is_valid, allowed = _CHECKS[name]
    if not is_valid(value):
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def state_dtype_name(value: Any) -> Any:
    """``torch.float32`` and ``torch.bfloat16`` by their names; anything else as it is."""
    return {torch.float32: "float32", torch.bfloat16: "bfloat16"}.get(value, value)


def resolve_group(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The group with every option filled in and checked.

    A ``rank`` or ``ratio`` of the group's own replaces either of the constructor's.

    Raises:
        ValueError: An option has a wrong value, or two options contradict each other.
    """
    resolved = {**defaults, "kind": None, **group}
    if group.get("ratio") is not None:
        resolved["rank"] = group.get("rank")
    elif group.get("rank") is not None:
        resolved["ratio"] = group.get("ratio")
    if resolved["ratio"] is not None and isinstance(resolved["rank"], _DefaultRank):
        resolved["rank"] = None
    resolved["state_dtype"] = state_dtype_name(resolved["state_dtype"])
    for name in _CHECKS:
        check_option(name, resolved[name])
    _check_together(resolved)
    if resolved["rank"] is not None:
        resolved["rank"] = int(resolved["rank"])
    if resolved["residual"] is None:
        resolved["residual"] = resolved["projection"] != "gaussian"
    return resolved


def _check_together(group: dict[str, Any]) -> None:
    """Refuse options that contradict each other, with the way out."""
    contradictions = (
        (
            group["rank"] is not None and group["ratio"] is not None,
            f"rank={group['rank']} and ratio={group['ratio']}: give one of them "
            "(ratio is min(m, n) // rank, the same for every tensor)",
        ),
        (group["rank"] is None and group["ratio"] is None, "rank=None and ratio=None: give one of them"),
        (
            group["lr"] is None and not group["relative_step"],
            "lr=None: give a learning rate (AdamW's fit), or relative_step=True to derive one from the step",
        ),
        (
            group["lr"] is not None and group["relative_step"],
            f"lr={group['lr']!r} and relative_step=True: the step derives the learning rate; give lr=None",
        ),
        (
            group["warmup_init"] and not group["relative_step"],
            "warmup_init=True without relative_step=True: it is the warm-up of the relative step",
        ),
        (
            group["projection"] == "gaussian" and group["residual"] is True,
            "residual=True with projection='gaussian': its rows are not orthogonal, so there is no residual; "
            "use projection='sign' or residual=False",
        ),
        (
            group["projection"] == "adaptive" and group["residual"] is False,
            "residual=False with projection='adaptive': a learnt projection is not unbiased; "
            "use projection='sign' or residual=True",
        ),
        (
            group["projection"] == "gaussian" and group["compile"],
            "compile=True with projection='gaussian': it is redrawn by the device's generator at every use, "
            "which torch.compile cannot trace; use projection='sign' or compile=False",
        ),
    )
    for contradicts, message in contradictions:
        if contradicts:
            raise ValueError(message)


def plan_of(shape: torch.Size, group: dict[str, Any]) -> TensorPlan:
    """The policy's plan for a tensor of a resolved group."""
    return plan_tensor(shape, **{name: group[name] for name in _PLAN_OPTIONS})
