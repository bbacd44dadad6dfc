"""The settings that ``floragrad compare`` tries."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from floragrad.cli.methods import DEFAULT_METHODS, METHODS
from floragrad.cli.options import Option, option, options_of
from floragrad.cli.train.config import ACCUMULATION, OPTIMIZER, OPTIONS, TRAINING

_SEVERAL: Final = {
    "optimizer": "methods",
    "lr": "lrs",
    "embedding_lr": "embedding_lrs",
    "accumulator": "accumulators",
    "accumulator_dtype": "accumulator_dtypes",
    "set": "set",
    "seed": "seeds",
}
"""Options of ``floragrad train`` in whose place there are options with several values."""
_LEFT_OUT: Final = ("backend", "fsdp", "timeout")
"""Options of ``floragrad train`` that a comparison has not."""
RESUME: Final = (
    "Continue what stopped in this folder, with its own options. --methods, --set, --accumulators, --seeds and "
    "learning rates beside it add rows; what they leave out is as at first."
)
DEFAULTS: Final = {"vocabulary": "shared", "keep_checkpoint": False}
"""Defaults of a comparison where they are not those of ``floragrad train``."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The settings of a comparison; None: each method's default.

    The first seed runs every setting, the others each contestant's best one.
    """

    methods: tuple[str, ...] = option(
        f"Methods to compare, in this order, of {', '.join(METHODS)}.",
        OPTIMIZER,
        default=DEFAULT_METHODS,
        shown=",".join(DEFAULT_METHODS),
        metavar="NAME,NAME,…",
        choices=OPTIONS["optimizer"].choices,
        example="flora,adamw",
    )
    lrs: tuple[float, ...] | None = option(
        "Learning rates to try with each method, on the first seed.",
        OPTIMIZER,
        default=None,
        shown="each method's own default",
        metavar="LR,LR,…",
        example="1e-3,2e-3",
    )
    lr_factors: tuple[float, ...] | None = option(
        "Multiples of each method's own default learning rate to try, instead of --lrs.",
        OPTIMIZER,
        default=None,
        metavar="FACTOR,FACTOR,…",
        example="0.5,1,2",
        above=0,
        maximum=1e6,
    )
    embedding_lrs: tuple[float, ...] | None = option(
        "Learning rates of the embedding and the output head to try, each with each of the others.",
        OPTIMIZER,
        default=None,
        shown="as in floragrad train",
        metavar="LR,LR,…",
        example="1e-3,2e-3",
    )
    accumulators: tuple[str, ...] | None = option(
        "Ways to gather gradients (see floragrad train --accumulator), each with each of --methods.",
        ACCUMULATION,
        default=None,
        shown="each method's own default",
        metavar="NAME,NAME,…",
        choices=OPTIONS["accumulator"].choices,
        example="exact,flora",
    )
    accumulator_dtypes: tuple[str, ...] | None = option(
        "Ways to store sketched gradients (see floragrad train --accumulator-dtype), a row for each.",
        ACCUMULATION,
        default=None,
        shown="int4",
        metavar="DTYPE,DTYPE,…",
        choices=OPTIONS["accumulator_dtype"].choices,
        example="int8,int4",
    )
    set: tuple[str, ...] = option(
        "Options of Flora, by their names in Python, each value with each of the others: a row for every combination. "
        "May be given several times.",
        OPTIMIZER,
        default=(),
        metavar="NAME=VALUE,VALUE,…",
    )
    seeds: tuple[int, ...] = option(
        "Seeds to run each method's best setting with.",
        TRAINING,
        default=(0,),
        shown="0",
        metavar="SEED,SEED,…",
        example="0,1,2",
    )


def comparison_options(training: Mapping[str, Option]) -> dict[str, Option]:
    """Return the options of ``floragrad compare``: those of training, some of them with several values."""
    grid = options_of(Grid)
    options: dict[str, Option] = {}
    for name, each in training.items():
        if name in _SEVERAL:
            options[_SEVERAL[name]] = grid.pop(_SEVERAL[name])
        elif name == "resume":
            options[name] = replace(each, help=RESUME)
        elif name not in _LEFT_OUT:
            options[name] = replace(each, default=DEFAULTS.get(name, each.default))
        if name == "lr":
            options["lr_factors"] = grid["lr_factors"]
    return options
