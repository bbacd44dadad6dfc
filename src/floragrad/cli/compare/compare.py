"""Comparison of methods: the same run with each, one after another."""

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import count, product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from rich.console import Console

from floragrad.cli.compare import worker
from floragrad.cli.compare.grid import Grid
from floragrad.cli.compare.picture import picture, state_figure
from floragrad.cli.compare.table import Best, as_json, as_markdown, show
from floragrad.cli.disk import read_object, write_text
from floragrad.cli.errors import StoppedError, UserError
from floragrad.cli.figures import Drawn, comparison_figure, save
from floragrad.cli.methods import METHODS, Method
from floragrad.cli.options import check_values, needing, option_name, options_of
from floragrad.cli.train import manifest
from floragrad.cli.train.config import OPTIONS, RunConfig
from floragrad.cli.train.defaults import accumulator as default_accumulator
from floragrad.cli.train.defaults import lr as default_lr
from floragrad.cli.train.folder import CONFIG, CORPUS, PLAN, RESTORE, RUNS, RunFolder, check_free, new_folder
from floragrad.cli.train.interrupt import StopRequest, blocked
from floragrad.cli.train.run import check_model, how_to_install, write_corpus
from floragrad.cli.train.settings import read_settings

Contestant: TypeAlias = dict[str, Any]


class Row(NamedTuple):
    """What one row of the table is about: the settings to try, and the fields of a run that are the row's own."""

    grid: Grid
    contestant: Contestant


TABLE, RESULTS, FIGURE, STATE_FIGURE = "table.md", "table.json", "comparison.png", "state.png"
ADDITION = "added-{}.json"


@dataclass(frozen=True, kw_only=True)
class Addition(Grid):
    """Rows that are added to a comparison.

    Attributes:
        command: The command that added them.
    """

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
        newest = {tuple(each.items()): Row(grid, each) for grid in self.grids for each in _contestants(grid)}
        return list(newest.values())

    def settings(self, row: Row) -> list[RunConfig]:
        """Every setting of one contestant, with the first seed.

        Raises:
            UserError: One of them is not allowed.
        """
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
        present = [row for row in self.rows if not how_to_install(row.contestant["optimizer"])]
        return sum(len(self.settings(row)) + len(row.grid.seeds) - 1 for row in present)

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Return the plan of the comparison in ``folder``.

        Raises:
            UserError: There is none.
        """
        if not (folder / PLAN).is_file():
            raise UserError(f"--resume {folder} holds no comparison: give a folder that floragrad compare has made")
        manifest.check(folder, RESTORE)
        values = _tuples(json.loads((folder / PLAN).read_text(encoding="utf-8")))
        values["options"] = _tuples(values["options"])
        methods = values.pop("optimizers", None)  # of an earlier version
        return cls(**({} if methods is None else {"methods": methods}), **values, added=tuple(_additions(folder)))

    def save(self, folder: Path) -> None:
        """Write the plan, without what was added, to a folder."""
        values = asdict(self)
        del values["added"]
        write_text(folder / PLAN, json.dumps(values, indent=2) + "\n")


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Return values that JSON has read, with tuples for its lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _additions(folder: Path) -> Iterator[Addition]:
    """Yield what was added to the comparison in ``folder``, oldest first."""
    for number in count(1):
        path = folder / ADDITION.format(number)
        if not path.exists():
            return
        try:
            yield Addition(**_tuples(read_object(path)))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): {RESTORE}, or delete it with its rows") from error


def _contestants(grid: Grid) -> list[Contestant]:
    """Return each method with each combination of settings and each way to gather gradients, as fields of a run."""
    return [
        {"optimizer": name, **({"set": chosen} if chosen else {}), **way}
        for name in grid.methods
        for chosen in product(*_settings(grid, METHODS[name]))
        for way in _ways(grid, name)
    ]


def _ways(grid: Grid, method: str) -> list[Contestant]:
    """Return each way in which a method's gradients are gathered; sketches in each of their dtypes."""
    found: list[Contestant] = []
    for way in [{"accumulator": name} for name in grid.accumulators or ()] or [{}]:
        sketched = default_accumulator({"optimizer": method, "accumulate": 2, **way}) == "flora"
        stored = (grid.accumulator_dtypes or ()) if sketched else ()
        found += [{**way, "accumulator_dtype": dtype} for dtype in stored] or [way]
    return found


def _settings(grid: Grid, method: Method) -> list[list[str]]:
    """Return the values of each setting that has an effect on a method, as ``NAME=VALUE``."""
    settings = read_settings(grid.set).items() if method.is_flora else ()
    return [[f"{name}={value}" for value in values] for name, values in settings if method.takes(name)]


def begin(plan: Plan, out: Path) -> None:
    """Make the folder of a new comparison: its plan, and the text and tokenizer that all its runs share.

    Raises:
        UserError: The comparison cannot be done; then there is no folder.
    """
    configs = check_plan(plan)
    check_free(out)
    with new_folder(out) as folder:
        write_corpus(configs[0], folder / CORPUS)
        (folder / RUNS).mkdir()
        plan.save(folder)


def extend(folder: Path, changes: Mapping[str, Any], command: str) -> None:
    """Add rows to the comparison in ``folder``, with the seeds and the learning rates that it began with.

    Args:
        folder: Of the comparison.
        changes: Fields of the added grid that differ from the first one's; ``set`` is empty without.
        command: The command that adds them.

    Raises:
        UserError: There is no comparison, or the rows are impossible; then nothing has changed.
    """
    plan = Plan.load(folder)
    first = {each.name: getattr(plan, each.name) for each in fields(Grid)}
    rates = {"lrs": None, "lr_factors": None} if {"lrs", "lr_factors"} & changes.keys() else {}
    added = Addition(**{**first, "set": (), **rates, **changes}, command=command)
    check_plan(replace(plan, added=(*plan.added, added)))
    write_text(folder / ADDITION.format(len(plan.added) + 1), json.dumps(asdict(added), indent=2) + "\n")


def check_plan(plan: Plan) -> list[RunConfig]:
    """Refuse a comparison that is impossible.

    Returns:
        Every setting of every row, with its first seed.

    Raises:
        UserError: A method is unknown or named twice, or an option belongs to none of them.
    """
    for grid in plan.grids:
        _check_grid(grid)
    methods = [METHODS[name] for grid in plan.grids for name in grid.methods]
    for name in [each.name for each in needing(OPTIONS, "optimizer") if each.name in plan.options]:
        if not any(method.takes(name) for method in methods):
            raise UserError(f"{option_name(name)} belongs to flora, which is not compared: leave it out")
    ways = {default_accumulator({**plan.options, **row.contestant}) for row in plan.rows}
    if "flora" not in ways and any(grid.accumulator_dtypes for grid in plan.grids):
        raise UserError("--accumulator-dtypes belongs to sketched gradients, which are not compared: leave it out")
    for each in needing(OPTIONS, "accumulator"):
        if each.name in plan.options and "flora" not in ways:
            raise UserError(
                f"{option_name(each.name)} belongs to sketched gradients, which are not compared: leave it out"
            )
    configs = [config for row in plan.rows for config in plan.settings(row)]
    for config in {config.label: config for config in configs}.values():
        if not how_to_install(config.optimizer):  # else its row says how
            check_model(config)
    return configs


def _check_grid(grid: Grid) -> None:
    check_values(options_of(Grid), vars(grid))
    for name in ("methods", "accumulators", "accumulator_dtypes", "seeds"):
        values = getattr(grid, name) or ()
        if len(set(values)) < len(values):
            raise UserError(f"{option_name(name)} {','.join(map(str, values))} names one twice: give each once")
    if grid.lrs and grid.lr_factors:
        raise UserError("--lrs and --lr-factors are both given: leave one out")
    methods = [METHODS[name] for name in grid.methods]
    for name in read_settings(grid.set):
        if not any(method.is_flora and method.takes(name) for method in methods):
            raise UserError(f"--set {name} belongs to flora, which is not compared: leave it out")


def compare(folder: Path, console: Console) -> None:
    """Finish the comparison in ``folder``. Its table and its pictures are written after each row that was trained.

    Raises:
        StoppedError: A signal has stopped it; finished work is kept.
        UserError: A run cannot be done.
    """
    plan, stop = Plan.load(folder), StopRequest()
    runner = _Runner(folder, plan.runs, console, stop)
    try:
        with stop.listening():
            bests: list[Best] = []
            rows = plan.rows
            for row in rows:
                trained = runner.trained
                bests.append(_best(plan, row, runner))
                if runner.trained > trained or len(bests) == len(rows):
                    numbers = _write_results(folder, plan, bests)
            show(console, numbers["rows"], numbers["step_time_of"])
            console.print(f"everything is in {folder}", soft_wrap=True, highlight=False)
    except KeyboardInterrupt:
        # A second Ctrl-C ends a run at once. Its newest checkpoint and the finished runs are kept.
        raise StoppedError(folder, "floragrad compare") from None


def _write_results(folder: Path, plan: Plan, bests: list[Best]) -> dict[str, Any]:
    """Write the table and the pictures of the rows that are finished; return the table as numbers."""
    finished = [best for best in bests if best.loss is not None]
    numbers = as_json(bests, [plan.command, *(added.command for added in plan.added)])
    write_text(folder / RESULTS, json.dumps(numbers, indent=2) + "\n")
    if finished:
        save(comparison_figure([_drawn(best) for best in finished], finished[0].title), folder / FIGURE)
        save(state_figure(picture(finished), finished[0].title), folder / STATE_FIGURE)
    write_text(folder / TABLE, as_markdown(bests, numbers))
    return numbers


def _drawn(best: Best) -> Drawn:
    return Drawn(
        best.config.label,
        best.optimizer,
        best.config.accumulator,
        RunFolder(best.first_run).metrics(),
        best.state_bytes,
        best.accumulation_bytes,
    )


def _best(plan: Plan, row: Row, runner: "_Runner") -> Best:
    """Run a contestant's grid, and its best setting on the other seeds."""
    grid, seeds = plan.settings(row), row.grid.seeds
    remedy = how_to_install(row.contestant["optimizer"])
    if remedy:
        return Best(grid[0], runner.path(grid[0]), seeds, [], [], remedy)
    results = [runner.run(config) for config in grid]
    order = sorted(zip(results, grid, strict=True), key=lambda pair: _loss(pair[0]))
    result, config = order[0]
    summaries = [result]
    if result["validation_loss"] is not None:
        summaries += [runner.run(replace(config, seed=seed)) for seed in seeds[1:]]
    return Best(config, runner.path(config), seeds, summaries, list(zip(grid, results, strict=True)))


def _loss(summary: dict[str, Any]) -> float:
    loss = summary["validation_loss"]
    return float("inf") if loss is None else float(loss)


class _Runner:
    """Does the runs that are not done yet, each in a process of its own."""

    def __init__(self, folder: Path, total: int, console: Console, stop: StopRequest) -> None:
        self._folder = folder
        self._total = total
        self._console = console
        self._stop = stop
        self._number = self.trained = 0

    def path(self, config: RunConfig) -> Path:
        """Return the folder of a run."""
        return self._folder / RUNS / _name(config)

    def run(self, config: RunConfig) -> dict[str, Any]:
        """Return the summary of a run, which is done first if need be."""
        self._number += 1
        path = self.path(config)
        if not path.is_dir():
            with new_folder(path) as new:
                write_text(new / CONFIG, config.to_json())
        run = RunFolder.open(path)
        if run.summary() is None:
            self._train(path, f"{self._number}/{self._total} {_name(config)}")
            self.trained += 1
        summary = run.summary()
        assert summary is not None
        run.tidy(checkpoints=config.keep_checkpoint and summary["validation_loss"] is not None)
        said = f"{self._number}/{self._total} {_name(config)}: {worker.outcome(summary)}"
        self._console.print(said, soft_wrap=True, highlight=False)
        return summary

    def _train(self, path: Path, title: str) -> None:
        if self._stop.signum is not None:
            raise StoppedError(self._folder, "floragrad compare", self._stop.signum)
        with self._worker(path, title) as process:
            exit_code = process.wait()
        if self._stop.signum is not None and exit_code != 0:
            raise StoppedError(self._folder, "floragrad compare", self._stop.signum)
        if exit_code != 0:
            raise UserError(
                f"the run {path} ended with exit code {exit_code}, and said why above: then continue "
                f"with floragrad compare --resume {self._folder}"
            )

    @contextlib.contextmanager
    def _worker(self, path: Path, title: str) -> Iterator["subprocess.Popen[bytes]"]:
        """Yield a process that trains the run, in a session of its own: signals reach it through us, once."""
        with blocked():
            process = subprocess.Popen(worker.command(path, title), start_new_session=True)
        try:
            with self._stop.forwarding(process.send_signal):
                yield process
        except BaseException:
            process.kill()
            process.wait()
            raise


def _name(config: RunConfig) -> str:
    gathered = () if config.accumulate == 1 else (config.accumulator, *filter(None, (config.accumulator_dtype,)))
    name = "-".join((config.optimizer, *config.set, *gathered))
    return f"{name}-lr{config.lr:g}-embedding{config.embedding_lr:g}-seed{config.seed}"
