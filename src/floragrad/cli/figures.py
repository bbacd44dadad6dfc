"""The picture of a run's loss, and what all pictures share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from floragrad.cli.disk import whole_file

COLOUR = "#1b7f4d"
SMOOTHING = 0.95
DOTS_PER_INCH = 150


def run_figure(metrics: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw a run's training loss, smoothed, and its validation loss over the steps."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    steps, losses = points_of(metrics, "loss")
    axes.plot(steps, losses, color=COLOUR, alpha=0.2, linewidth=0.8)
    axes.plot(steps, smoothed(losses), color=COLOUR, linewidth=1.4, label="training loss, smoothed")
    axes.plot(*points_of(metrics, "validation_loss"), "o-", color="#222222", markersize=4, label="validation loss")
    axes.set_title(title, loc="left")
    finish(axes)
    axes.legend(frameon=False)
    return figure


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


def points_of(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a number was measured, and its values."""
    lines = [line for line in metrics if line.get(name) is not None]
    return [line["step"] for line in lines], [line[name] for line in lines]


def smoothed(values: Sequence[float]) -> list[float]:
    """Return an exponential average, corrected for its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(total / weight)
    return smoothed


def finish(axes: Axes, x: str = "step", y: str = "loss (nats)") -> None:
    """Name the axes, and draw a pale grid."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
