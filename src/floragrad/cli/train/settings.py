"""``--set NAME=VALUE``: any option of Flora that changes a run's loss, by its name in Python."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

from floragrad.cli.errors import UserError
from floragrad.cli.options import LARGEST_INTEGER

ELSEWHERE: Final = frozenset({"lr", "weight_decay", "seed", "kind", "maximize", "relative_step", "warmup_init"})
"""Options of Flora that other options of the command line set, or that are none of a run."""
_WORDS: Final = {"true": True, "false": False, "none": None, "never": LARGEST_INTEGER}


def read_settings(given: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the values of each option of ``NAME=VALUE[,VALUE…]``, as they were written; refuse wrong ones."""
    found: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, _, rest = text.partition("=")
        values = tuple(value.strip() for value in rest.split(","))
        if not name or "" in values:
            raise UserError(f"--set {text!r} cannot be read: give NAME=VALUE, like ratio=2")
        if name in found:
            raise UserError(f"--set {name} is given twice: give it once")
        if len(set(values)) < len(values):
            raise UserError(f"--set {text} names one twice: give each once")
        for value in values:
            _check(name, value)
        found[name] = values
    return found


def setting_value(text: str) -> Any:
    """Return the value that a text stands for.

    Example:
        >>> [setting_value(text) for text in ("2", "0.5", "false", "int4", "1e-30:1e-3")]
        [2, 0.5, False, 'int4', (1e-30, 0.001)]
    """
    if text in _WORDS:
        return _WORDS[text]
    if ":" in text:
        return tuple(setting_value(part) for part in text.split(":"))
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        return float(text)
    return text


def _check(name: str, value: str) -> None:
    """Refuse an option that Flora has not, or a wrong value."""
    from floragrad.torch.options import check_option, did_you_mean, option_names

    known = [option for option in option_names() if option not in ELSEWHERE]
    if name not in known:
        raise UserError(
            f"--set {name} is no option of Flora{did_you_mean(name, known)}: choose one of {', '.join(known)}"
        )
    try:
        check_option(name, setting_value(value))
    except ValueError as error:
        raise UserError(f"--set {error}") from error


def check_together(options: dict[str, Any]) -> None:
    """Refuse options of Flora that contradict each other."""
    from torch import zeros

    from floragrad import Flora

    try:
        Flora([zeros(1)], lr=1.0, **options)
    except ValueError as error:
        raise UserError(f"--set: {error}") from error
