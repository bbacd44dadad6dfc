"""What a run is: every choice, resolved and checked before anything is read or written."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any, Final, get_args, get_origin, get_type_hints

from floragrad.train.environment import default_threads
from floragrad.train.errors import UserError
from floragrad.train.presets import FINE_TUNING_LEARNING_RATE, LEARNING_RATES, PRESETS, LearningRates

FLORA_OPTIONS: Final = ("rank", "kappa", "projection", "state_dtype", "release")
SKETCH_OPTIONS: Final = ("accumulator_ratio", "accumulator_dtype", "accumulator_projection", "release")
"""What belongs to ``--accumulator flora``."""
CHOICES: Final = {
    "optimizer": tuple(LEARNING_RATES),
    "projection": ("sign", "adaptive", "gaussian"),
    "state_dtype": ("float32", "bfloat16", "int8", "int4"),
    "backend": ("torch", "jax"),
    "dtype": ("float32", "bfloat16"),
    "accumulator": ("flora", "exact", "none"),
    "accumulator_dtype": ("float32", "bfloat16", "int8", "int4"),
    "accumulator_projection": ("sign", "gaussian"),
}
SMALLEST: Final = {
    "steps": 1,
    "batch_size": 1,
    "accumulate": 1,
    "accumulator_ratio": 1,
    "sequence_length": 2,
    "vocab_size": 257,  # the 256 bytes and the end of a text
    "warmup_steps": 0,
    "rank": 1,
    "kappa": 1,
    "eval_every": 1,
    "eval_blocks": 1,
    "save_every": 1,
    "threads": 1,
    "timeout": 1,
    "seed": 0,
}
LARGEST_INTEGER: Final = 2**31 - 1
"""What a C int holds; torch, numpy and the Trainer take no more everywhere."""
LARGEST: Final = {
    "seed": 2**32 - 1,
    "threads": 4096,
    "timeout": 10**7,
    "lr": 1e37,  # its default multiple for the embedding is a float32 too
    "embedding_lr": 1e38,
    "weight_decay": 1e38,
    "max_grad_norm": 1e38,
    "max_megabytes": 1e12,
}
_GATHERED: Final = {"flora": "sketched gradients", "exact": "exact gradients", "none": "no accumulation"}
POSITIVE: Final = ("lr", "embedding_lr", "max_megabytes")
NOT_NEGATIVE: Final = ("weight_decay", "max_grad_norm")
STANDARD_LIBRARY_MEGABYTES: Final = 4.0
DATASET_MEGABYTES: Final = 200.0


def option_name(field: str) -> str:
    """The command-line option that sets ``field``."""
    return "--" + field.replace("_", "-")


@dataclass(frozen=True)
class RunConfig:
    """One training run. Make it with :meth:`resolve`, which fills in the defaults and checks every value.

    The fields are the options of ``floragrad train``; their help says what each one means. ``prepared`` is
    set by ``floragrad compare`` only: the folder, relative to the run's, whose text and tokenizer it reads.
    """

    model: str
    optimizer: str
    text: tuple[str, ...]
    dataset: str | None
    dataset_config: str | None
    dataset_split: str | None
    text_column: str | None
    max_megabytes: float | None
    vocab_size: int | None
    sequence_length: int
    batch_size: int
    accumulate: int
    accumulator: str
    accumulator_ratio: int | None
    accumulator_dtype: str | None
    accumulator_projection: str | None
    release: bool | None
    steps: int
    lr: float
    embedding_lr: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    rank: int | None
    kappa: int | None
    projection: str | None
    state_dtype: str | None
    backend: str
    dtype: str
    seed: int
    eval_every: int
    eval_blocks: int
    save_every: int
    keep_checkpoint: bool
    threads: int
    fsdp: bool = False
    timeout: int = 600
    prepared: str | None = None

    @classmethod
    def resolve(cls, **given: Any) -> "RunConfig":
        """The configuration of what the user gave, with a default for everything else.

        Args:
            **given: Values by field name; None, or nothing, means the default.

        Raises:
            UserError: A value is out of range, or two options contradict each other.
        """
        chosen = {name: value for name, value in given.items() if value is not None and value != ()}
        _check_values(chosen)
        _check_conflicts(chosen)
        if chosen.get("fsdp"):
            _check_sharding(chosen.get("backend", "torch"), chosen.get("optimizer", "flora"))
        config = cls(**{**_defaults(chosen), **chosen})
        if config.warmup_steps >= config.steps:
            raise UserError(
                f"--warmup-steps {config.warmup_steps} leaves none of the {config.steps} steps for the full "
                f"learning rate: give at most {config.steps - 1}, or more --steps"
            )
        return config

    def launched(self, fsdp: bool | None, timeout: int | None) -> "RunConfig":
        """The same run, its processes started in another way; None leaves things as they were.

        Raises:
            UserError: It cannot be done in that way.
        """
        chosen: dict[str, Any] = {"fsdp": fsdp, "timeout": timeout}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        _check_values(chosen)
        if fsdp:
            _check_sharding(self.backend, self.optimizer)
        return replace(self, **chosen)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.batch_size * self.micro_batches * self.sequence_length

    @property
    def micro_batches(self) -> int:
        """Micro-batches whose gradients make one optimizer step."""
        return 1 if self.accumulator == "none" else self.accumulate

    @property
    def label(self) -> str:
        """The optimizer, and how gradients are gathered where that was asked for."""
        if self.accumulate == 1:
            return self.optimizer
        return f"{self.optimizer}, {_GATHERED[self.accumulator]}"

    @property
    def uses_hub(self) -> bool:
        """Whether the Hugging Face hub may be asked for the model or the text."""
        names = (self.dataset, None if self.model in PRESETS else self.model)
        return any(name is not None and not Path(name).is_dir() for name in names)

    def to_json(self) -> str:
        """The configuration as a JSON object, one field a line."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """Read what :meth:`to_json` wrote.

        Raises:
            UserError: It is no such object, or a value is out of range.
        """
        try:
            values = json.loads(text)
            config = replace(cls(**values), text=tuple(values["text"]))
            _check_types(config)
        except (ValueError, TypeError, KeyError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise UserError(f"config.json is not a run's configuration ({error}); its fields are {names}") from error
        _check_values({name: value for name, value in asdict(config).items() if value is not None})
        return config


def learning_rates(model: str, optimizer: str) -> LearningRates:
    """The default learning rates of an optimizer on a model."""
    if model in PRESETS:
        return LEARNING_RATES[optimizer]
    return LearningRates(FINE_TUNING_LEARNING_RATE, FINE_TUNING_LEARNING_RATE)


def default_rank(hidden_size: int) -> int:
    """A quarter of the hidden size, as the GaLore paper has it for its larger models."""
    return max(1, hidden_size // 4)


def _defaults(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Every field's default, given what was chosen."""
    model, optimizer = chosen.get("model", "tiny"), chosen.get("optimizer", "flora")
    preset = PRESETS.get(model)
    steps = chosen.get("steps", preset.steps if preset else 1000)
    rates = learning_rates(model, optimizer)
    flora = optimizer == "flora"
    accumulator = default_accumulator(chosen)
    sketched = accumulator == "flora"
    return {
        "model": model,
        "optimizer": optimizer,
        "text": (),
        "dataset": None,
        "dataset_config": None,
        "dataset_split": "train" if "dataset" in chosen else None,
        "text_column": "text" if "dataset" in chosen else None,
        "max_megabytes": _default_megabytes(chosen, model),
        "vocab_size": preset.vocab_size if preset else None,
        "sequence_length": preset.sequence_length if preset else 256,
        "batch_size": preset.batch_size if preset else 8,
        "accumulate": 1,
        "accumulator": accumulator,
        "accumulator_ratio": 1 if sketched else None,
        "accumulator_dtype": "int4" if sketched else None,
        "accumulator_projection": "sign" if sketched else None,
        "release": flora and chosen.get("backend") != "jax" if sketched else None,
        "steps": steps,
        "lr": rates.lr,
        "embedding_lr": chosen.get("lr", rates.lr) * (rates.embedding_lr / rates.lr),
        "warmup_steps": steps // 10,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "rank": default_rank(preset.hidden_size) if flora and preset else 128 if flora else None,
        "kappa": (100 if chosen.get("projection") == "adaptive" else 1000) if flora else None,
        "projection": "sign" if flora else None,
        "state_dtype": "int8" if flora else None,
        "backend": "torch",
        "dtype": "float32",
        "seed": 0,
        "eval_every": min(1000, max(1, steps // 10)),
        "eval_blocks": 128,
        "save_every": min(1000, max(1, steps // 4)),
        "keep_checkpoint": True,
        "threads": default_threads(),
    }


def default_accumulator(chosen: Mapping[str, Any]) -> str:
    """How gradients are gathered: as was said, else in sketches with Flora and exactly with the others."""
    if chosen.get("accumulate", 1) == 1:
        return "none"
    default = "flora" if chosen.get("optimizer", "flora") == "flora" else "exact"
    return str(chosen.get("accumulator", default))


def _default_megabytes(chosen: Mapping[str, Any], model: str) -> float | None:
    if "dataset" in chosen:
        return DATASET_MEGABYTES
    return STANDARD_LIBRARY_MEGABYTES if model == "tiny" and "text" not in chosen else None


def _check_values(chosen: Mapping[str, Any]) -> None:
    for name, allowed in CHOICES.items():
        if name in chosen and chosen[name] not in allowed:
            raise UserError(f"{option_name(name)} {chosen[name]!r} is unknown: choose one of {', '.join(allowed)}")
    for name, smallest in SMALLEST.items():
        largest = LARGEST.get(name, LARGEST_INTEGER)
        if name in chosen and not smallest <= chosen[name] <= largest:
            limit = f" and at most {largest}" if name in LARGEST or chosen[name] > largest else ""
            raise UserError(f"{option_name(name)} is {chosen[name]}: give a whole number of at least {smallest}{limit}")
    for name in (*POSITIVE, *NOT_NEGATIVE):
        if name not in chosen:
            continue
        value = chosen[name]
        if not isfinite(value) or value < 0 or (value == 0 and name in POSITIVE):
            allowed_values = "above 0" if name in POSITIVE else "of 0 or more"
            raise UserError(f"{option_name(name)} is {value}: give a number {allowed_values}")
        if value > LARGEST[name]:
            raise UserError(f"{option_name(name)} is {value}: give a number of at most {LARGEST[name]:g}")


def _check_types(config: RunConfig) -> None:
    """Find a field that holds another type than it is declared with."""
    for name, declared in get_type_hints(RunConfig).items():
        kinds = tuple(get_origin(kind) or kind for kind in get_args(declared) or (declared,))
        if get_origin(declared) is tuple:
            kinds = (tuple,)
        if float in kinds:
            kinds = (*kinds, int)
        value = getattr(config, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(f"{name} is {value!r}")


def _check_sharding(backend: str, optimizer: str) -> None:
    """Refuse ``--fsdp`` where something does not take a part of a tensor for the whole."""
    if backend == "jax":
        raise UserError("--fsdp is PyTorch's: leave it out with --backend jax, which trains on one device")
    if optimizer == "adafactor":
        raise UserError(
            "--fsdp gives each process a part of every tensor, and Hugging Face's Adafactor takes whole ones only: "
            "choose --optimizer flora or adamw, or leave --fsdp out"
        )


def _check_conflicts(chosen: Mapping[str, Any]) -> None:
    if chosen.get("backend") == "jax":
        if chosen.get("model", "tiny") not in PRESETS:
            raise UserError(
                f"--backend jax trains new Llamas of the sizes {', '.join(PRESETS)}, and --model {chosen['model']} is "
                "none of them: choose one, or leave --backend out"
            )
        if "release" in chosen:
            raise UserError("--release frees gradients inside torch's backward pass: leave it out with --backend jax")
    if "text" in chosen and "dataset" in chosen:
        raise UserError("--text and --dataset are both given, and a run reads one of them: leave one out")
    for name in ("dataset_config", "dataset_split", "text_column"):
        if name in chosen and "dataset" not in chosen:
            raise UserError(f"{option_name(name)} belongs to --dataset, which is not given: add it, or leave it out")
    if "vocab_size" in chosen and chosen.get("model", "tiny") not in PRESETS:
        raise UserError(
            f"--vocab-size does not apply to --model {chosen['model']}, which has a tokenizer of its own: leave it out"
        )
    optimizer = chosen.get("optimizer", "flora")
    for name in FLORA_OPTIONS:
        if name in chosen and optimizer != "flora":
            raise UserError(f"{option_name(name)} belongs to --optimizer flora, and this is {optimizer}: leave it out")
    if chosen.get("accumulator", "none") != "none" and chosen.get("accumulate", 1) == 1:
        raise UserError(
            f"--accumulator {chosen['accumulator']} gathers the gradients of several micro-batches, and --accumulate "
            "is 1: give --accumulate 2 or more, or leave it out"
        )
    accumulator = default_accumulator(chosen)
    for name in SKETCH_OPTIONS:
        if name in chosen and accumulator != "flora":
            raise UserError(
                f"{option_name(name)} belongs to --accumulator flora, and this is {accumulator}: leave it out, or "
                "give --accumulator flora and --accumulate 2 or more"
            )
