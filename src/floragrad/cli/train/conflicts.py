"""Options of a run that contradict each other."""

from collections.abc import Mapping
from typing import Any

from floragrad.cli.errors import UserError
from floragrad.cli.methods import DEFAULT_METHODS
from floragrad.cli.options import Option, check_requirements, needing, option_name
from floragrad.cli.presets import PAIR_TASKS, PRESETS, TASKS
from floragrad.cli.train import defaults


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
