"""The plan of a comparison: the settings that ``floragrad compare`` tries, as options and as rows of its table."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count, product
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from floragrad.cli.disk import read_object, write_text
from floragrad.cli.errors import UserError
from floragrad.cli.methods import DEFAULT_METHODS, METHODS
from floragrad.cli.options import Option, check_values, needing, option, option_name, options_of
from floragrad.cli.train import manifest
from floragrad.cli.train.checks import read_settings
from floragrad.cli.train.config import ACCUMULATION, OPTIMIZER, OPTIONS, TRAINING, RunConfig
from floragrad.cli.train.defaults import accumulator as default_accumulator
from floragrad.cli.train.defaults import lr as default_lr
from floragrad.cli.train.folder import CORPUS, PLAN, RESTORE

Contestant: TypeAlias = dict[str, Any]
ADDITION: Final = "added-{}.json"
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

    @property
    def runs_of_each(self) -> int:
        """Number of runs of one contestant."""
        tried = len(self.lrs or self.lr_factors or (None,)) * len(self.embedding_lrs or (None,))
        return tried + len(self.seeds) - 1

    @property
    def contestants(self) -> list[Contestant]:
        """Each method with each combination of settings and each way to gather gradients, as fields of a run."""
        return [
            {"optimizer": name, **({"set": chosen} if chosen else {}), **way}
            for name in self.methods
            for chosen in product(*self._settings(name))
            for way in self._ways(name)
        ]

    def _settings(self, method: str) -> list[list[str]]:
        """Return the values of each setting that has an effect on a method, as ``NAME=VALUE``."""
        settings = read_settings(self.set).items() if METHODS[method].is_flora else ()
        return [[f"{name}={value}" for value in values] for name, values in settings if METHODS[method].takes(name)]

    def _ways(self, method: str) -> Iterator[Contestant]:
        """Yield each way in which a method's gradients are gathered; sketches in each of their dtypes."""
        for way in [{"accumulator": name} for name in self.accumulators or ()] or [{}]:
            sketched = default_accumulator({"optimizer": method, "accumulate": 2, **way}) == "flora"
            stored = (self.accumulator_dtypes or ()) if sketched else ()
            yield from [{**way, "accumulator_dtype": dtype} for dtype in stored] or [way]

    def check_grid(self) -> None:
        """Refuse settings that are not allowed, or given twice."""
        check_values(options_of(Grid), vars(self))
        for name in ("methods", "accumulators", "accumulator_dtypes", "seeds"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise UserError(f"{option_name(name)} {','.join(map(str, values))} names one twice: give each once")
        if self.lrs and self.lr_factors:
            raise UserError("--lrs and --lr-factors are both given: leave one out")
        for name in read_settings(self.set):
            if not any(METHODS[each].is_flora and METHODS[each].takes(name) for each in self.methods):
                raise UserError(f"--set {name} belongs to flora, which is not compared: leave it out")


class Row(NamedTuple):
    """What one row of the table is about: the settings to try, and the fields of a run that are the row's own."""

    grid: Grid
    contestant: Contestant


@dataclass(frozen=True, kw_only=True)
class Addition(Grid):
    """Rows that are added to a comparison, by a command."""

    command: str


@dataclass(frozen=True, kw_only=True)
class Plan(Grid):
    """A comparison.

    Attributes:
        options: Fields of :class:`RunConfig` that all runs share.
        command: The command that made this comparison.
        added: What was added to it.
    """

    options: dict[str, Any]
    command: str
    added: tuple[Addition, ...] = ()

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The settings that the comparison began with, and those added."""
        return (self, *self.added)

    @property
    def rows(self) -> list[Row]:
        """Every contestant once, with the newest grid that has it."""
        newest = {tuple(each.items()): Row(grid, each) for grid in self.grids for each in grid.contestants}
        return list(newest.values())

    def settings(self, row: Row) -> list[RunConfig]:
        """Return every setting of one contestant, with the first seed."""
        grid, contestant = row
        method = METHODS[contestant["optimizer"]]
        foreign = [each for each in needing(OPTIONS, "optimizer") if not method.takes(each.name)]
        if default_accumulator({**self.options, **contestant}) != "flora":
            foreign = foreign + needing(OPTIONS, "accumulator")
        options = {name: value for name, value in self.options.items() if name not in {each.name for each in foreign}}
        standard = default_lr({**options, **contestant})
        lrs = grid.lrs or ([factor * standard for factor in grid.lr_factors] if grid.lr_factors else (None,))
        return [
            replace(
                RunConfig.resolve(**options, **contestant, seed=grid.seeds[0], lr=lr, embedding_lr=embedding_lr),
                prepared=f"../../{CORPUS}",
            )
            for lr in lrs
            for embedding_lr in grid.embedding_lrs or (None,)
        ]

    @property
    def runs(self) -> int:
        """Number of runs of the methods that are installed."""
        return sum(row.grid.runs_of_each for row in self.rows if not METHODS[row.contestant["optimizer"]].remedy)

    def check(self) -> list[RunConfig]:
        """Return every setting of every row, with its first seed; refuse a comparison that is impossible."""
        for grid in self.grids:
            grid.check_grid()
        methods = [METHODS[name] for grid in self.grids for name in grid.methods]
        for each in needing(OPTIONS, "optimizer"):
            if each.name in self.options and not any(method.takes(each.name) for method in methods):
                raise UserError(f"{option_name(each.name)} belongs to flora, which is not compared: leave it out")
        if "flora" not in {default_accumulator({**self.options, **row.contestant}) for row in self.rows}:
            foreign = [option_name(each.name) for each in needing(OPTIONS, "accumulator") if each.name in self.options]
            dtypes = ["--accumulator-dtypes"] if any(grid.accumulator_dtypes for grid in self.grids) else []
            for name in dtypes + foreign:
                raise UserError(f"{name} belongs to sketched gradients, which are not compared: leave it out")
        return [config for row in self.rows for config in self.settings(row)]

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Return the plan of the comparison in ``folder``."""
        if not (folder / PLAN).is_file():
            raise UserError(f"--resume {folder} holds no comparison: give a folder that floragrad compare has made")
        manifest.check(folder, RESTORE)
        values = read_object(folder / PLAN, tuples=True)
        if "optimizers" in values:  # of an earlier version
            values["methods"] = values.pop("optimizers")
        return cls(**values, added=tuple(_additions(folder)))

    def save(self, folder: Path) -> None:
        """Write the plan, without what was added, to a folder."""
        values = asdict(self)
        del values["added"]
        write_text(folder / PLAN, json.dumps(values, indent=2) + "\n")


def _additions(folder: Path) -> Iterator[Addition]:
    """Yield what was added to the comparison in ``folder``, oldest first."""
    for number in count(1):
        path = folder / ADDITION.format(number)
        if not path.exists():
            return
        try:
            yield Addition(**read_object(path, tuples=True))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): {RESTORE}, or delete it with its rows") from error


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
