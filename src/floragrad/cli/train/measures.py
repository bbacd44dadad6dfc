"""Measures of tasks beside the loss, in the metrics, the summary and the table of a comparison."""

from collections.abc import Mapping
from typing import Any, Final

_FORMATS: Final = {
    "accuracy": ".2%",
    "token_accuracy": ".2%",
    "bleu": ".2f",
    "rouge1": ".2f",
    "rouge2": ".2f",
    "rougeL": ".2f",
}
_NAMES: Final = {"bleu": "BLEU", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def measures_of(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the measures among the values of a line or a summary."""
    return {name: values[name] for name in _FORMATS if values.get(name) is not None}


def measure_name(name: str) -> str:
    """Return a measure's name in words: ``"token accuracy"``, ``"BLEU"``."""
    return _NAMES.get(name, name.replace("_", " "))


def format_measure(name: str, value: float) -> str:
    """Return a measure's value: ``"87.50%"``, ``"12.34"``."""
    return format(value, _FORMATS[name])
