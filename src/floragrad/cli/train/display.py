"""Screen of a run: opening, progress, summary."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from floragrad._text import format_bytes
from floragrad.cli.presets import job_name
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
    """The screen of one run: its opening, its progress, its summary.

    Args:
        console: Where to write.
        title: Label of the progress.
        brief: Show the progress only, and leave nothing behind.
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
    first, last = summary["first_validation_loss"], summary["validation_loss"]
    kept, adamw = summary["optimizer_state_bytes"], summary["adamw_state_bytes"]
    change = summary["validation_loss_change"]
    losses = f"{first:.4f} → {last:.4f} ({abs(100 * change):.1f}% {'lower' if change < 0 else 'higher'})"
    perplexities = f"{summary['first_perplexity']:,.1f} → {summary['perplexity']:,.1f}"
    return [
        ("validation loss", losses),
        *_blocks(summary),
        ("perplexity", perplexities),
        *((measure_name(name), format_measure(name, value)) for name, value in measures_of(summary).items()),
        (
            "optimizer state",
            f"{format_bytes(kept)}, measured; AdamW's: {format_bytes(adamw)} ({adamw / kept:.1f} times)",
        ),
        *_shared(summary),
        *_gathered(summary),
        ("peak memory", f"{format_bytes(summary['peak_memory_bytes'])} of the {summary['peak_memory_of']}"),
        ("time", f"{duration(summary['seconds'])}, {1000 * summary['step_seconds']:.0f} ms a step"),
        _read(summary),
    ]


def _read(summary: dict[str, Any]) -> tuple[str, str]:
    """Return the row on the tokens or examples that were read."""
    unit = next(name for name in ("tokens", "examples") if name in summary)
    return unit, f"{summary[unit]:,} in {summary['steps']} steps"


def _blocks(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on the error of the validation loss; none for runs that an earlier version finished."""
    if summary.get("standard_error") is None:
        return []
    count, held_out = len(summary["block_losses"]), summary["held_out_blocks"]
    blocks = TASKS[summary.get("task", "lm")].blocks
    return [("standard error", f"{summary['standard_error']:.4f} over {count:,} of {held_out:,} {blocks}")]


def _shared(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on several processes; none for runs of versions that had one."""
    count = summary.get("processes", 1)
    if count == 1:
        return []
    return [("processes", f"{count}, with {'a part' if summary['fsdp'] else 'all'} of the model each; sizes are one's")]


def _gathered(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on the gradients of a window, where there are windows."""
    if summary["micro_batches"] == 1:
        return []
    kept, exact = summary["accumulation_bytes"], summary["gradient_bytes"]
    share = "" if kept == exact else f"; exact: {format_bytes(exact)} ({exact / kept:.1f} times)"
    return [("gathered gradients", f"{format_bytes(kept)} over {summary['micro_batches']} micro-batches{share}")]
