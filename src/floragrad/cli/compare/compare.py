"""Comparison of methods: the same run with each, one after another."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from floragrad.cli.compare import worker
from floragrad.cli.compare.picture import comparison_figure, picture, state_figure
from floragrad.cli.compare.plan import ADDITION, Addition, Grid, Plan, Row
from floragrad.cli.compare.table import Best, as_json, as_markdown, show
from floragrad.cli.disk import write_text
from floragrad.cli.errors import StoppedError, UserError
from floragrad.cli.figures import save
from floragrad.cli.methods import METHODS
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.folder import CONFIG, CORPUS, RUNS, RunFolder, check_free, new_folder
from floragrad.cli.train.interrupt import StopRequest, blocked
from floragrad.cli.train.run import check_model, write_corpus

TABLE, RESULTS, FIGURE, STATE_FIGURE = "table.md", "table.json", "comparison.png", "state.png"


def begin(plan: Plan, out: Path) -> None:
    """Make the folder of a new comparison: its plan, and the text and tokenizer that all its runs share."""
    configs = _checked(plan)
    check_free(out)
    with new_folder(out) as folder:
        write_corpus(configs[0], folder / CORPUS)
        (folder / RUNS).mkdir()
        plan.save(folder)


def extend(folder: Path, changes: Mapping[str, Any], command: str) -> None:
    """Add rows to the comparison in ``folder``, with the seeds and the learning rates that it began with.

    If they are impossible, nothing changes.

    Args:
        folder: Of the comparison.
        changes: Fields of the added grid that differ from the first one's; ``set`` is empty without.
        command: The command that adds them.
    """
    plan = Plan.load(folder)
    first = {each.name: getattr(plan, each.name) for each in fields(Grid)}
    rates = {"lrs": None, "lr_factors": None} if {"lrs", "lr_factors"} & changes.keys() else {}
    added = Addition(**{**first, "set": (), **rates, **changes}, command=command)
    _checked(replace(plan, added=(*plan.added, added)))
    write_text(folder / ADDITION.format(len(plan.added) + 1), json.dumps(asdict(added), indent=2) + "\n")


def _checked(plan: Plan) -> list[RunConfig]:
    """Refuse a comparison that is impossible. Returns every setting of every row, with its first seed."""
    configs = plan.check()
    for config in {config.label: config for config in configs}.values():
        if not METHODS[config.optimizer].remedy:  # else its row says how
            check_model(config)
    return configs


def compare(folder: Path, console: Console) -> None:
    """Finish the comparison in ``folder``. Its table and its pictures are written after each row that was trained.

    Raises:
        StoppedError: A signal has stopped it; finished work is kept.
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
        save(comparison_figure(finished, finished[0].title), folder / FIGURE)
        save(state_figure(picture(finished), finished[0].title), folder / STATE_FIGURE)
    write_text(folder / TABLE, as_markdown(bests, numbers))
    return numbers


def _best(plan: Plan, row: Row, runner: "_Runner") -> Best:
    """Run a contestant's grid, and its best setting on the other seeds."""
    grid, seeds = plan.settings(row), row.grid.seeds
    remedy = METHODS[row.contestant["optimizer"]].remedy
    if remedy:
        return Best(grid[0], runner.path(grid[0]), seeds, [], [], remedy)
    results = [runner.run(config) for config in grid]
    tried = list(zip(grid, results, strict=True))
    finished = [each for each in tried if each[1]["validation_loss"] is not None]
    config, result = min(finished, key=lambda each: float(each[1]["validation_loss"]), default=tried[0])
    summaries = [result]
    if finished:
        summaries += [runner.run(replace(config, seed=seed)) for seed in seeds[1:]]
    return Best(config, runner.path(config), seeds, summaries, tried)


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
        """Train a run in a process and a session of its own: signals reach it through us, once."""
        exit_code = 0
        if self._stop.signum is None:
            with blocked():
                process = subprocess.Popen(worker.command(path, title), start_new_session=True)
            try:
                with self._stop.forwarding(process.send_signal):
                    exit_code = process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
            if exit_code == 0:
                return
        if self._stop.signum is not None:
            raise StoppedError(self._folder, "floragrad compare", self._stop.signum)
        raise UserError(
            f"the run {path} ended with exit code {exit_code}, and said why above: then continue "
            f"with floragrad compare --resume {self._folder}"
        )


def _name(config: RunConfig) -> str:
    gathered = () if config.accumulate == 1 else (config.accumulator, *filter(None, (config.accumulator_dtype,)))
    name = "-".join((config.optimizer, *config.set, *gathered))
    return f"{name}-lr{config.lr:g}-embedding{config.embedding_lr:g}-seed{config.seed}"
