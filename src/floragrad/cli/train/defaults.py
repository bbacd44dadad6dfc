"""Defaults of a run's options that depend on the other options: functions of the given values, by name."""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from floragrad.cli.methods import EMBEDDING_LR, METHODS, Method
from floragrad.cli.presets import FINE_TUNING_LEARNING_RATE, PAIR_TASKS, TASKS, Preset

STANDARD_LIBRARY_MEGABYTES: Final = 4.0
DATASET_MEGABYTES: Final = 200.0
Given: TypeAlias = Mapping[str, Any]
Derive: TypeAlias = Callable[[Given], Any]


def rank_of(hidden_size: int) -> int:
    """Return a quarter of the hidden size, as the GaLore paper has it for its larger models."""
    return max(1, hidden_size // 4)


def accumulator(given: Given) -> str:
    """Return how gradients are gathered: as given, else in sketches with Flora and exactly with the others."""
    if given.get("accumulate", 1) == 1:
        return "none"
    return str(given.get("accumulator", "flora" if is_flora(given) else "exact"))


def method(given: Given) -> Method:
    """Return the method that trains."""
    return METHODS[given.get("optimizer", "flora")]


def is_flora(given: Given) -> bool:
    """Return whether Flora trains."""
    return method(given).is_flora


def of_preset(name: str, otherwise: Any) -> Derive:
    """Derive a default from the preset's attribute; every other model has the same."""

    def derive(given: Given) -> Any:
        preset = _preset(given)
        return getattr(preset, name) or None if preset else otherwise

    return derive


def with_dataset(default: Any) -> Derive:
    """Derive a default with a dataset; None without."""
    return lambda given: default if "dataset" in given else None


def column(**by_task: str) -> Derive:
    """Derive a dataset's column from the task; None for other tasks, and without a dataset."""
    return lambda given: with_dataset(by_task.get(given.get("task", "lm")))(given)


def of_task(lm: Any, otherwise: Any) -> Derive:
    """Derive a default of language models, and that of the other tasks."""
    return lambda given: lm if given.get("task", "lm") == "lm" else otherwise


def with_flora(option: str, default: Any) -> Derive:
    """Derive a default with Flora, itself derived if it is a function; None where it has no effect."""

    def derive(given: Given) -> Any:
        chosen = method(given)
        return _value(default, given) if chosen.takes(option) else (chosen.flora or {}).get(option)

    return derive


def with_sketches(default: Any) -> Derive:
    """Derive a default where gradients are sketched, itself derived if it is a function; None elsewhere."""
    return lambda given: _value(default, given) if accumulator(given) == "flora" else None


def lr(given: Given) -> float:
    """Return the method's default learning rate; of trained weights, as a multiple of AdamW's."""
    found = method(given).lr
    return found if _preset(given) else FINE_TUNING_LEARNING_RATE * (found / METHODS["adamw"].lr)


def embedding_lr(given: Given) -> float:
    """Return the default multiple of the learning rate; where all methods share the vocabulary's, the same for all."""
    if given.get("vocabulary") == "shared":
        return _embedding_lr(given)
    standard = lr(given)
    return float(given.get("lr", standard) * (_embedding_lr(given) / standard))


def max_megabytes(given: Given) -> float | None:
    """Return how much text is read."""
    if "dataset" in given:
        return DATASET_MEGABYTES
    if given.get("task") == "vision":
        return None
    return STANDARD_LIBRARY_MEGABYTES if given.get("model", "tiny") == "tiny" and "text" not in given else None


def target_length(given: Given) -> int | None:
    """Return how long a target may be: a translation like its source, a summary a quarter; None without targets."""
    task = given.get("task", "lm")
    if task not in PAIR_TASKS:
        return None
    length = int(given.get("sequence_length", of_preset("sequence_length", 256)(given)))
    return max(2, length // 4) if task == "summarization" else length


def rank(given: Given) -> int:
    """Return the rank of a preset, or of another model."""
    preset = _preset(given)
    return rank_of(preset.hidden_size) if preset else 128


steps: Final = of_preset("steps", 1000)


def part_of_steps(part: int, least: int, most: int | None = None) -> Derive:
    """Derive a part of the steps, between two bounds."""

    def derive(given: Given) -> int:
        found = max(least, int(given.get("steps", steps(given))) // part)
        return found if most is None else min(most, found)

    return derive


def _preset(given: Given) -> Preset | None:
    return TASKS[given.get("task", "lm")].get(given.get("model", "tiny"))


def _embedding_lr(given: Given) -> float:
    return EMBEDDING_LR if _preset(given) else FINE_TUNING_LEARNING_RATE


def _value(default: Any, given: Given) -> Any:
    return default(given) if callable(default) else default
