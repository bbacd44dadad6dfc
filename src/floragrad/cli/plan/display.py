"""Tables of ``floragrad plan``."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from floragrad._text import format_bytes
from floragrad.cli.plan import result
from floragrad.cli.plan.result import MemoryPlan, PlanSettings
from floragrad.cli.plan.sizes import Size
from floragrad.cli.plan.verdict import WORDS, verdict

WIDTH_WITHOUT_TERMINAL = 200
"""Columns of a table that no terminal shows: in a file nothing should be wrapped."""
EVERYWHERE = ("parameters", "gradients", "accumulation", "optimizer_state", "activations", "temporaries")


def screen() -> Console:
    """Return the console that tables are printed on."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDTH_WITHOUT_TERMINAL)


@contextmanager
def progress(console: Console) -> Iterator[result.Progress]:
    """Show a progress bar; nothing is left of it, and without a terminal there is none."""
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda doing, done: bar.update(task, description=doing, completed=done)


def title(plan: MemoryPlan, reads_text: bool) -> str:
    """Return the training step in a few words."""
    return f"{plan.model}: {', '.join(_settings_in_words(plan.settings, reads_text))}"


def _settings_in_words(settings: PlanSettings, reads_text: bool) -> Iterator[str]:
    yield f"batch {settings.batch} x {settings.sequence:,} tokens" if reads_text else f"batch {settings.batch}"
    yield settings.dtype
    if settings.accumulate > 1:
        yield f"{settings.accumulate} micro-batches"
    if settings.checkpointing:
        yield "activations recomputed"
    for way, devices in (("DDP", settings.ddp), ("FSDP2", settings.fsdp)):
        if devices > 1:
            yield f"{way} over {devices} devices"
    if settings.defer_reduction:
        yield "reduced once"


def plan_table(plan: MemoryPlan, heading: str) -> Table:
    """Bytes of each category and the peak, a line for each optimizer."""
    distributed = plan.settings.ddp > 1 or plan.settings.fsdp > 1
    categories = (*EVERYWHERE, "buckets") if distributed else EVERYWHERE
    table = Table(title=heading, title_justify="left")
    table.add_column("optimizer", no_wrap=True)
    for category in categories:
        table.add_column(WORDS[category], justify="right")
    if distributed:
        table.add_column("sent", justify="right")
    table.add_column("peak", justify="right", style="bold")
    table.add_column("at the peak", overflow="fold")
    for name in plan.settings.optimizers:
        if name in plan.optimizers:
            row = plan.optimizers[name]
            sizes = [getattr(row, category) for category in (*categories, *(("sent",) if distributed else ()), "peak")]
            table.add_row(name, *map(format_bytes, sizes), row.peak_moment)
        else:
            table.add_row(name, *[""] * (len(table.columns) - 2), plan.unavailable[name])
    return table


def fits_table(plan: MemoryPlan, device: Size, reads_text: bool) -> Table:
    """Return the table of which optimizers fit a device."""
    table = Table(title=f"on a device of {device.words}", title_justify="left")
    table.add_column("optimizer", no_wrap=True)
    table.add_column("verdict")
    for name, row in plan.optimizers.items():
        table.add_row(name, verdict(name, row, plan.settings, device, reads_text))
    return table
