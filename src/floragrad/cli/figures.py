"""The pictures: one run's loss, and a comparison's losses and optimizer states."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from floragrad._text import format_bytes
from floragrad.cli.disk import whole_file

COLOURS = {"flora": "#1b7f4d", "adamw": "#c4572e", "adafactor": "#4464ad"}
OTHER_COLOURS = [matplotlib.colormaps["tab20"](index) for index in range(20)]
"""Of other methods, in turn."""
LINES = {"flora": "-", "exact": "--", "none": ":"}
"""By accumulator, where gradients are gathered."""
MOST_UPRIGHT = 4
"""Beyond so many bars their names and sizes are written from bottom to top, and the legend is small."""
SMOOTHING = 0.95
DOTS_PER_INCH = 150


def run_figure(metrics: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw a run's training loss, smoothed, and its validation loss over the steps."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    colour = COLOURS["flora"]
    steps, losses = _points(metrics, "loss")
    axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(steps, _smoothed(losses), color=colour, linewidth=1.4, label="training loss, smoothed")
    axes.plot(*_points(metrics, "validation_loss"), "o-", color="#222222", markersize=4, label="validation loss")
    axes.set_title(title, loc="left")
    _finish(axes)
    return figure


@dataclass(frozen=True)
class Drawn:
    """One line of a comparison's picture.

    Attributes:
        label: Its name.
        method: Which colour it has.
        accumulator: Which line it has.
        metrics: Of one run.
        state_bytes: Measured bytes of the optimizer's state.
        accumulation_bytes: Of the gradients of earlier micro-batches.
    """

    label: str
    method: str
    accumulator: str
    metrics: Sequence[Mapping[str, Any]]
    state_bytes: int
    accumulation_bytes: int


def comparison_figure(contestants: Sequence[Drawn], title: str) -> Figure:
    """Each contestant's losses over the steps, and beside them a bar of its state between micro-batches."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    losses, bars = figure.subplots(1, 2, width_ratios=[2.2, 1])
    gathers = any(each.accumulation_bytes for each in contestants)
    many = len(contestants) > MOST_UPRIGHT
    colours = _colours(contestants)
    for each, colour in zip(contestants, colours, strict=True):
        line = LINES[each.accumulator] if gathers else "-"
        steps, values = _points(each.metrics, "loss")
        losses.plot(steps, _smoothed(values), line, color=colour, alpha=0.35, linewidth=1)
        points = _points(each.metrics, "validation_loss")
        losses.plot(*points, f"o{line}", color=colour, markersize=4, linewidth=1.4, label=each.label)
    losses.set_title("validation loss (dots), training loss (pale)", loc="left", fontsize=10)
    _finish(losses)
    if many:
        losses.legend(frameon=False, fontsize=7, ncols=3, loc="upper right")
    names = [each.label.replace(", ", ",\n") for each in contestants]
    states = [each.state_bytes for each in contestants]
    totals = [each.state_bytes + each.accumulation_bytes for each in contestants]
    drawn = bars.bar(names, [size / 1e6 for size in states], color=colours)
    if gathers:
        gathered = [each.accumulation_bytes / 1e6 for each in contestants]
        drawn = bars.bar(names, gathered, bottom=[size / 1e6 for size in states], color=colours, alpha=0.4)
    labels: dict[str, Any] = {"fontsize": 7, "rotation": 90} if many else {"fontsize": 9}
    bars.bar_label(drawn, [format_bytes(size) for size in totals], **labels, padding=2)
    what = "optimizer state, and gathered gradients (pale)" if gathers else "optimizer state, measured"
    bars.set_title(what, loc="left", fontsize=10)
    bars.tick_params(axis="x", labelsize=8, labelrotation=90 if many else 0)
    bars.margins(y=0.25 if many else 0.05)
    bars.set_ylabel("MB")
    bars.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _colours(contestants: Sequence[Drawn]) -> list[Any]:
    """Return a colour for each: the method's own where no other contestant has it, else the next free one."""
    others, found = cycle(OTHER_COLOURS), []
    known = Counter((each.method, each.accumulator) for each in contestants)
    for each in contestants:
        own = COLOURS.get(each.method) if known[each.method, each.accumulator] == 1 else None
        found.append(own or next(others))
    return found


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the path ends with, whole or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_INCH, format=file_format(path))


def file_format(path: Path) -> str:
    """Return the format of a picture's name, as matplotlib calls it: ``"jpg"``."""
    return path.suffix.removeprefix(".").lower()


def formats() -> list[str]:
    """Return the formats that figures can be saved in."""
    return sorted(Figure().canvas.get_supported_filetypes())


def _points(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    lines = [line for line in metrics if line.get(name) is not None]
    return [line["step"] for line in lines], [line[name] for line in lines]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return an exponential average, corrected for its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(total / weight)
    return smoothed


def _finish(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
