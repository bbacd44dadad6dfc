"""Options of a parameter group: checks, defaults and plans."""

import math
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Final, get_args

import torch

from floragrad._checks import (
    FLAG,
    SHARED_CHECKS,
    Check,
    DefaultRank,
    check_contradictions,
    check_renamed,
    check_value,
    is_integer,
    is_number,
    is_rate,
    one_of,
    shared_contradictions,
)
from floragrad.policy import Kind, SecondMomentDtype, TensorPlan, plan_tensor

RENAMED: Final = {"quantization": "state_dtype='int8' for True (the default), state_dtype='float32' for False"}
"""What to write for the keywords of flora-opt's Flora that have another name here."""
_OTHER_LAYOUT: Final = "its state has another layout"
_OTHER_BASIS: Final = "its momentum was encoded with other random projections"

LAYOUT_OPTIONS: Final[dict[str, str]] = {
    "rank": _OTHER_LAYOUT,
    "ratio": _OTHER_LAYOUT,
    "kappa": _OTHER_BASIS,
    "seed": _OTHER_BASIS,
    "projection": _OTHER_BASIS,
    "residual": "its momentum belongs to the other estimator",
    "embedding_momentum": _OTHER_LAYOUT,
    "state_dtype": "its momentum is stored in another format",
    "factorize_second_moment": _OTHER_LAYOUT,
    "second_moment_dtype": "its second moment is stored in another format",
    "kind": _OTHER_LAYOUT,
    "beta1": "one of them keeps a momentum, the other none",
}
"""Options that fix the layout of the state, with the reason why another value cannot read it."""
ADDED_OPTIONS: Final = {"maximize": False, "second_moment_dtype": "float32"}
"""Options that states of earlier versions do not have, with the only value of them then."""

_PLAN_OPTIONS: Final = (
    "rank",
    "ratio",
    "projection",
    "beta1",
    "factorize_second_moment",
    "embedding_momentum",
    "state_dtype",
    "second_moment_dtype",
    "kind",
)


def _is_lr(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return value is None or is_rate(value)


def _is_eps(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(is_number(v) and v >= 0 for v in value)


_CHECKS: Final[dict[str, Check]] = SHARED_CHECKS | {
    "lr": (_is_lr, "a number >= 0, or None with relative_step=True; a Tensor lr must be 1-element"),
    "eps": (_is_eps, "two numbers >= 0: (added to squared gradients, least parameter scale)"),
    "clip_threshold": (lambda value: is_number(value) and value > 0, "a number > 0; inf does not clip"),
    "decay_rate": (lambda value: is_number(value) and value <= 0, "a number <= 0"),
    "beta1": (
        lambda value: value is None or (is_number(value) and 0 <= value < 1),
        "a number in [0, 1), or None for no momentum",
    ),
    "weight_decay": (lambda value: is_number(value) and value >= 0, "a number >= 0"),
    "scale_parameter": FLAG,
    "relative_step": FLAG,
    "warmup_init": FLAG,
    "factorize_second_moment": FLAG,
    "second_moment_dtype": one_of(*get_args(SecondMomentDtype)),
    "seed": (lambda value: is_integer(value, 0), "an integer from 0 to 2**63 - 1"),
    "stochastic_rounding": FLAG,
    "maximize": FLAG,
    "kind": one_of(None, *get_args(Kind)),
}


def option_names() -> tuple[str, ...]:
    """Return all options of a parameter group."""
    return tuple(_CHECKS)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the known name that another misspells, as a question in brackets; empty if there is none.

    Example:
        >>> did_you_mean("embeding_lr", ("lr", "embedding_lr")), did_you_mean("initial_lr", ("lr", "rank"))
        (' (did you mean embedding_lr?)', '')
    """
    found = get_close_matches(name, known, n=1, cutoff=0.8)
    return f" (did you mean {found[0]}?)" if found else ""


def check_option(name: str, value: Any) -> None:
    """Refuse a wrong value of one option.

    Raises:
        ValueError: Naming the option, the value and the allowed ones.
    """
    check_value(name, value, _CHECKS[name])


def drop_compile(group: dict[str, Any], stacklevel: int) -> dict[str, Any]:
    """Return the group without ``compile``, which is deprecated and has no effect.

    Args:
        group: Options as the user gave them.
        stacklevel: Of the warning, as seen from the caller.
    """
    if group.get("compile") is not None:
        warn_compile_deprecated(stacklevel + 1)
    return {name: value for name, value in group.items() if name != "compile"}


def warn_compile_deprecated(stacklevel: int) -> None:
    """Warn that ``compile`` changes nothing.

    Args:
        stacklevel: Of the warning, as seen from the caller.
    """
    warnings.warn(
        "compile= of Flora has no effect and will be refused in the next release: leave it out. On CPUs the "
        "native kernels take less time than the compiled step did; elsewhere PyTorch's operations run. A model under "
        "torch.compile is trained as before",
        FutureWarning,
        stacklevel=stacklevel + 1,
    )


def state_dtype_name(value: Any) -> Any:
    """Return the name of ``torch.float32`` or ``torch.bfloat16``; any other value as it is."""
    return {torch.float32: "float32", torch.bfloat16: "bfloat16"}.get(value, value)


def relative_lr(group: dict[str, Any], step: int) -> float:
    """Return the learning rate that ``relative_step`` derives from the step."""
    return min(1e-6 * step if group["warmup_init"] else 1e-2, 1 / math.sqrt(step))


def check_relative_lr(lr: Any) -> None:
    """Refuse a learning rate beside ``relative_step``.

    Raises:
        ValueError: It is not None.
    """
    if lr is not None:
        raise ValueError(f"lr={lr!r} and relative_step=True: the step derives the learning rate; give lr=None")


def resolve_group(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the group with every option filled in and checked.

    A ``rank`` or ``ratio`` of the group's own replaces either of the constructor's.

    Raises:
        ValueError: An option is misspelt or has a wrong value, or two options contradict each other.
        TypeError: An option has flora-opt's name.
    """
    check_renamed(group, RENAMED)
    for name in group.keys() - defaults.keys() - {"kind", "params", "param_names"}:
        # Schedulers and users may add keys to groups; misspelt options are refused.
        meant = did_you_mean(name, option_names())
        if meant:
            raise ValueError(f"a group has {name}={group[name]!r}, which is no option of Flora{meant}")
    # Further defaults are for schedulers.
    resolved = {name: defaults[name] for name in option_names() if name in defaults} | {"kind": None, **group}
    if "lr" not in group and defaults["relative_step"]:
        resolved["lr"] = None  # the default is for schedulers
    if group.get("ratio") is not None:
        resolved["rank"] = group.get("rank")
    elif group.get("rank") is not None:
        resolved["ratio"] = group.get("ratio")
    if resolved["ratio"] is not None and isinstance(resolved["rank"], DefaultRank):
        resolved["rank"] = None
    resolved["state_dtype"] = state_dtype_name(resolved["state_dtype"])
    for name in _CHECKS:
        check_option(name, resolved[name])
    _check_contradictions(resolved)
    if resolved["relative_step"]:
        first = relative_lr(resolved, 1)
        check_relative_lr(resolved["lr"] if resolved["lr"] != first else None)
        resolved["lr"] = first  # for schedulers
    resolved |= as_integers(resolved, "rank", "ratio", "kappa", "seed")
    if resolved["residual"] is None:
        resolved["residual"] = resolved["projection"] != "gaussian"
    return resolved


def as_integers(options: Mapping[str, Any], *names: str) -> dict[str, int | None]:
    """Return checked options as Python integers, which ``torch.load(weights_only=True)`` allows."""
    return {name: None if options[name] is None else int(options[name]) for name in names}


def _check_contradictions(group: dict[str, Any]) -> None:
    """Refuse options that contradict each other, with the remedy."""
    check_contradictions(shared_contradictions(group))
    contradictions = (
        (
            group["lr"] is None and not group["relative_step"],
            "lr=None: give a learning rate (AdamW's fit), or relative_step=True to derive one from the step",
        ),
        (
            group["warmup_init"] and not group["relative_step"],
            "warmup_init=True without relative_step=True: it is the warm-up of the relative step",
        ),
        (
            group["second_moment_dtype"] != "float32" and group["factorize_second_moment"],
            f"second_moment_dtype={group['second_moment_dtype']!r} without factorize_second_moment=False: a factored "
            "second moment is a row and a column, in float32",
        ),
    )
    check_contradictions(contradictions)


def with_added_options(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a saved group, those included that its version did not have."""
    return {**ADDED_OPTIONS, **saved}


def layout_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that fix the layout of a group's state."""
    return {name: group[name] for name in LAYOUT_OPTIONS}


def changed_option(written: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    """Return the first layout option with another value in the group; empty if there is none.

    ``beta1`` may change unless the change adds or removes a momentum.
    """
    for name in LAYOUT_OPTIONS:
        before, now = written[name], group[name]
        if before != now and (name != "beta1" or bool(before) != bool(now)):
            return name
    return ""


def plan_for(shape: torch.Size, group: dict[str, Any]) -> TensorPlan:
    """Return the policy's plan for a tensor of a resolved group."""
    return plan_tensor(shape, **{name: group[name] for name in _PLAN_OPTIONS})
