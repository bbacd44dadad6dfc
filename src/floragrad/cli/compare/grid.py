"""The settings that ``floragrad compare`` tries."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from floragrad.cli.options import Option, option, options_of
from floragrad.cli.presets import LEARNING_RATES
from floragrad.cli.train.config import ACCUMULATION, OPTIMIZER, OPTIONS, TRAINING

_SEVERAL: Final = {
    "optimizer": "optimizers",
    "lr": "lrs",
    "embedding_lr": "embedding_lrs",
    "accumulator": "accumulators",
    "seed": "seeds",
}
"""Options of ``floragrad train`` in whose place there are options with several values."""
_LEFT_OUT: Final = ("backend", "fsdp", "timeout")
"""Options of ``floragrad train`` that a comparison has not."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The settings of a comparison; None: each optimizer's default.

    The first seed runs every setting, the others each contestant's best one.
    """

    optimizers: tuple[str, ...] = option(
        "Optimizers to compare, in this order.",
        OPTIMIZER,
        default=tuple(LEARNING_RATES),
        shown=",".join(LEARNING_RATES),
        metavar="NAME,NAME,…",
        choices=OPTIONS["optimizer"].choices,
        example="flora,adamw",
    )
    lrs: tuple[float, ...] | None = option(
        "Learning rates to try with each optimizer, on the first seed.",
        OPTIMIZER,
        default=None,
        shown="each optimizer's own default",
        metavar="LR,LR,…",
        example="1e-3,2e-3",
    )
    embedding_lrs: tuple[float, ...] | None = option(
        "Learning rates of the embedding and the output head to try, each with each of --lrs.",
        OPTIMIZER,
        default=None,
        shown="the same multiple of --lrs as in floragrad train",
        metavar="LR,LR,…",
        example="1e-3,2e-3",
    )
    accumulators: tuple[str, ...] | None = option(
        "Ways to gather gradients (see floragrad train --accumulator), each with each of --optimizers.",
        ACCUMULATION,
        default=None,
        shown="each optimizer's own default",
        metavar="NAME,NAME,…",
        choices=OPTIONS["accumulator"].choices,
        example="exact,flora",
    )
    seeds: tuple[int, ...] = option(
        "Seeds to run each optimizer's best setting with.",
        TRAINING,
        default=(0,),
        shown="0",
        metavar="SEED,SEED,…",
        example="0,1,2",
    )


def comparison_options(training: Mapping[str, Option]) -> dict[str, Option]:
    """Return the options of ``floragrad compare``: those of training, some of them with several values."""
    grid = options_of(Grid)
    return {
        _SEVERAL.get(name, name): grid[_SEVERAL[name]] if name in _SEVERAL else each
        for name, each in training.items()
        if name not in _LEFT_OUT
    }
