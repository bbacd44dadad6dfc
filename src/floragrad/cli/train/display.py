"""Screen of a run: opening, progress, summary."""

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from floragrad._text import format_bytes, format_table
from floragrad.cli.presets import job_name
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.measures import format_measure, measure_name, measures_of
from floragrad.cli.train.tasks import TASKS

LINES_WITHOUT_TERMINAL = 10
"""A run whose output is no terminal writes so many lines instead of a bar."""


def duration(seconds: float) -> str:
    """Return a time in words: ``"1 h 02 min"``, ``"1 min 34 s"``, ``"12.3 s"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"


class Display:
    """The screen of one run: its opening, its progress under a title, its summary.

    If it is brief, it shows the progress only, and leaves nothing behind.
    """

    def __init__(self, console: Console, title: str = "training", brief: bool = False) -> None:
        self._console = console
        self._title = title
        self._brief = brief
        self._progress: Progress | None = None
        self._steps, self._unit = 0, "tokens"

    def say(self, text: str) -> None:
        """Write a line or a table of plain text."""
        if not self._brief:
            self._console.print(Text(text), soft_wrap=True)

    def begin(self, step: int, steps: int, unit: str = "tokens") -> None:
        """Show the progress from ``step`` on, and the speed in units a second."""
        self._steps, self._unit = steps, unit
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._console, transient=self._brief)
            self._progress.add_task(self._title, total=steps, completed=step, numbers="")
            self._progress.start()

    def step(self, step: int, loss: float, speed: float, memory: int) -> None:
        """Show the progress after a training step."""
        numbers = f"loss {loss:.3f} · {speed:,.0f} {self._unit}/s · {format_bytes(memory)}"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, numbers=numbers)
        elif step % max(1, self._steps // LINES_WITHOUT_TERMINAL) == 0:
            self.say(f"step {step}/{self._steps} · {numbers}")

    def evaluation(self, step: int, loss: float, perplexity: float, measures: Mapping[str, float]) -> None:
        """Show a validation loss, and the task's other measures."""
        others = "".join(f", {measure_name(name)} {format_measure(name, each)}" for name, each in measures.items())
        self.say(f"step {step}/{self._steps} · validation loss {loss:.4f}, perplexity {perplexity:,.1f}{others}")

    def end(self) -> None:
        """Stop showing the progress."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def summary(self, summary: dict[str, Any], folder: str) -> None:
        """Show the summary of a run that is finished."""
        if self._brief:
            return
        title = f"{job_name(summary.get('task', 'lm'), summary['model'])} with {summary['optimizer']}"
        table = Table(show_header=False, title=title, title_justify="left")
        for row in _summary_rows(summary):
            table.add_row(*row)
        self._console.print(table)
        self.say(f"everything is in {folder}")


def _summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the summary; of runs that an earlier version finished, those that they have."""
    first, last = summary["first_validation_loss"], summary["validation_loss"]
    kept, adamw = summary["optimizer_state_bytes"], summary["adamw_state_bytes"]
    change, processes = summary["validation_loss_change"], summary.get("processes", 1)
    rows = [
        (
            "validation loss",
            f"{first:.4f} → {last:.4f} ({abs(100 * change):.1f}% {'lower' if change < 0 else 'higher'})",
        )
    ]
    if summary.get("standard_error") is not None:
        counts = f"{len(summary['block_losses']):,} of {summary['held_out_blocks']:,}"
        blocks = TASKS[summary.get("task", "lm")].blocks
        rows.append(("standard error", f"{summary['standard_error']:.4f} over {counts} {blocks}"))
    rows += [
        ("perplexity", f"{summary['first_perplexity']:,.1f} → {summary['perplexity']:,.1f}"),
        *((measure_name(name), format_measure(name, value)) for name, value in measures_of(summary).items()),
        (
            "optimizer state",
            f"{format_bytes(kept)}, measured; AdamW's: {format_bytes(adamw)} ({adamw / kept:.1f} times)",
        ),
    ]
    if processes > 1:
        part = "a part" if summary["fsdp"] else "all"
        rows.append(("processes", f"{processes}, with {part} of the model each; sizes are one's"))
    if summary["micro_batches"] > 1:
        kept, exact = summary["accumulation_bytes"], summary["gradient_bytes"]
        share = "" if kept == exact else f"; exact: {format_bytes(exact)} ({exact / kept:.1f} times)"
        over = f"{format_bytes(kept)} over {summary['micro_batches']} micro-batches{share}"
        rows.append(("gathered gradients", over))
    unit = next(name for name in ("tokens", "examples") if name in summary)
    return [
        *rows,
        ("peak memory", f"{format_bytes(summary['peak_memory_bytes'])} of the {summary['peak_memory_of']}"),
        ("time", f"{duration(summary['seconds'])}, {1000 * summary['step_seconds']:.0f} ms a step"),
        (unit, f"{summary[unit]:,} in {summary['steps']} steps"),
    ]


def opening(config: RunConfig, report: Any, sizes: Mapping[str, int]) -> str:
    """Describe the optimizer's state, and how gradients are gathered where they are.

    Args:
        config: Of the run.
        report: Flora's; None for the other optimizers.
        sizes: In bytes, by their names in the summary.
    """
    whole = sizes["adamw_state_bytes"]
    if report is not None:
        said = _condensed(report)
    elif config.optimizer == "adamw":
        said = f"AdamW compresses nothing: two elements for every parameter, {format_bytes(whole)} of state"
    elif config.optimizer == "adafactor":
        said = (
            "Adafactor keeps rows and columns of the second moment, and one element of momentum for every "
            f"parameter: at least {format_bytes(whole / 2)} of state, AdamW {format_bytes(whole)}"
        )
    else:
        said = f"{config.optimizer} trains; AdamW's state for the same parameters is {format_bytes(whole)}"
    return said if config.micro_batches == 1 else f"{said}\n{_accumulation_line(config, sizes)}"


def _accumulation_line(config: RunConfig, sizes: Mapping[str, int]) -> str:
    """Describe how the gradients of several micro-batches are gathered, and in how many bytes."""
    kept, exact = sizes["accumulation_bytes"], sizes["gradient_bytes"]
    if config.accumulator == "exact":
        return f"gradients of {config.micro_batches} micro-batches are gathered exactly: {format_bytes(kept)}"
    projected = "" if config.accumulator_ratio == 1 else f" of one element for {config.accumulator_ratio} columns"
    return (
        f"gradients of {config.micro_batches} micro-batches are gathered as {config.accumulator_dtype} "
        f"sketches{projected}: {format_bytes(kept)}, {kept / exact:.1%} of the gradients' {format_bytes(exact)}"
    )


def _condensed(report: Any) -> str:
    """Flora's report with one line for the tensors that differ in their layer's number only."""
    like = groupby(sorted(report.rows, key=_likeness), key=_likeness)
    lines = [("tensors", "shape", "count", "ρ", "state", "momentum")]
    for (kept, name, shape, ratio), group in like:
        rows = list(group)
        size = format_bytes(sum(row.state_bytes for row in rows))
        sketched = rows[0].momentum == "sketch"
        dimensions = " x ".join(map(str, shape))
        lines.append((name, dimensions, str(len(rows)), str(ratio) if sketched else "", size, kept))
    total = (
        f"Flora keeps a sketch of the momentum of {report.compressed} of {len(report.rows)} tensors: "
        f"{format_bytes(report.state_bytes)} of state, {report.state_bytes / report.adamw_bytes:.1%} of AdamW's "
        f"{format_bytes(report.adamw_bytes)}, {report.state_bytes / report.adafactor_bytes:.1%} of Adafactor's "
        f"{format_bytes(report.adafactor_bytes)}"
    )
    return "\n".join([*format_table(lines), total])


def _likeness(row: Any) -> tuple[str, str, tuple[int, ...], int]:
    kept = "a sketch" if row.momentum == "sketch" else row.reason
    return kept, re.sub(r"\d+", "*", row.name), row.shape, row.ratio
