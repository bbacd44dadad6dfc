"""Options of a run that contradict each other, and ``--set NAME=VALUE``: any option of Flora by its name in Python."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

from floragrad.cli.errors import UserError
from floragrad.cli.methods import DEFAULT_METHODS
from floragrad.cli.options import LARGEST_INTEGER, Option, check_requirements, needing, option_name
from floragrad.cli.presets import PAIR_TASKS, PRESETS, TASKS
from floragrad.cli.train import defaults

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


def check_sharding(backend: str, optimizer: str, vocabulary: str) -> None:
    """Refuse ``--fsdp`` where something does not take a part of a tensor for the whole."""
    if backend == "jax":
        raise UserError("--fsdp is PyTorch's: leave it out with --backend jax, which trains on one device")
    if optimizer not in ("flora", "adamw"):
        what = "Hugging Face's Adafactor" if optimizer == "adafactor" else optimizer
        raise UserError(
            f"--fsdp gives each process a part of every tensor, and {what} takes whole ones only: "
            "choose --optimizer flora or adamw, or leave --fsdp out"
        )
    if vocabulary == "shared":
        raise UserError("--fsdp has one optimizer for all tensors: leave it out, or --vocabulary shared")


def check_conflicts(given: Mapping[str, Any], options: Mapping[str, Option]) -> None:
    """Refuse given values of a run's options that contradict each other."""
    task = given.get("task", "lm")
    model = given.get("model", "tiny")
    if model not in TASKS[task] and (task not in ("lm", *PAIR_TASKS) or model in PRESETS):
        other = ", or a model of Hugging Face" if task in PAIR_TASKS else ", which trains new models of its own"
        raise UserError(
            f"--model {model} is none of --task {task}{other}: choose {', '.join(TASKS[task])}, or leave it out"
        )
    check_requirements(options, given)
    if given.get("backend") == "jax":
        if task != "lm":
            raise UserError(f"--backend jax trains language models, and --task is {task}: leave one out")
        if given.get("model", "tiny") not in PRESETS:
            raise UserError(
                f"--backend jax trains new Llamas of the sizes {', '.join(PRESETS)}, and --model {given['model']} is "
                "none of them: choose one, or leave --backend out"
            )
        if given.get("optimizer", "flora") not in DEFAULT_METHODS:
            raise UserError(
                f"--backend jax trains with {', '.join(DEFAULT_METHODS)}, and --optimizer {given['optimizer']} is none "
                "of them: choose one, or leave --backend out"
            )
        if "set" in given:
            raise UserError("--set sets options of PyTorch's Flora: leave it out with --backend jax")
        if given.get("vocabulary") == "shared":
            raise UserError("--vocabulary shared is PyTorch's: leave it out with --backend jax")
        if "release" in given:
            raise UserError("--release frees gradients inside torch's backward pass: leave it out with --backend jax")
    if "text" in given and "dataset" in given:
        raise UserError("--text and --dataset are both given, and a run reads one of them: leave one out")
    for each in needing(options, "dataset"):
        if each.name in given and "dataset" not in given:
            raise UserError(
                f"{option_name(each.name)} belongs to --dataset, which is not given: add it, or leave it out"
            )
    if "vocab_size" in given and given.get("model", "tiny") not in PRESETS:
        raise UserError(
            f"--vocab-size does not apply to --model {given['model']}, which has a tokenizer of its own: leave it out"
        )
    optimizer, method = given.get("optimizer", "flora"), defaults.method(given)
    for each in needing(options, "optimizer"):
        if each.name in given and not method.takes(each.name):
            raise UserError(
                f"{option_name(each.name)} belongs to --optimizer flora, and this is {optimizer}: leave it out"
            )
    if given.get("accumulator", "none") != "none" and given.get("accumulate", 1) == 1:
        raise UserError(
            f"--accumulator {given['accumulator']} gathers the gradients of several micro-batches, and --accumulate "
            "is 1: give --accumulate 2 or more, or leave it out"
        )
    accumulator = defaults.accumulator(given)
    for each in needing(options, "accumulator"):
        if each.name in given and accumulator != "flora":
            raise UserError(
                f"{option_name(each.name)} belongs to --accumulator flora, and this is {accumulator}: leave it out, or "
                "give --accumulator flora and --accumulate 2 or more"
            )
