"""The pictures: one run's loss, and a comparison's losses and optimizer states."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from floragrad._text import format_bytes

COLOURS = {"flora": "#1b7f4d", "adamw": "#c4572e", "adafactor": "#4464ad"}
SMOOTHING = 0.95
DOTS_PER_INCH = 150


def run_figure(metrics: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """A run's training loss, smoothed, and its validation loss over the steps."""
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


def comparison_figure(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], state_bytes: Mapping[str, int], title: str
) -> Figure:
    """Each optimizer's losses over the steps, and beside them a bar of its state.

    Args:
        curves: Metrics of one run by optimizer.
        state_bytes: Measured bytes of the optimizer's state, by optimizer.
        title: Over the picture.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    losses, bars = figure.subplots(1, 2, width_ratios=[2.2, 1])
    for name, metrics in curves.items():
        steps, values = _points(metrics, "loss")
        losses.plot(steps, _smoothed(values), color=COLOURS[name], alpha=0.35, linewidth=1)
        points = _points(metrics, "validation_loss")
        losses.plot(*points, "o-", color=COLOURS[name], markersize=4, linewidth=1.4, label=name)
    losses.set_title("validation loss (dots), training loss (pale)", loc="left", fontsize=10)
    _finish(losses)
    names = list(state_bytes)
    drawn = bars.bar(names, [state_bytes[name] / 1e6 for name in names], color=[COLOURS[name] for name in names])
    bars.bar_label(drawn, [format_bytes(state_bytes[name]) for name in names], fontsize=9, padding=2)
    bars.set_title("optimizer state, measured", loc="left", fontsize=10)
    bars.set_ylabel("MB")
    bars.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, dpi=DOTS_PER_INCH, format="png")
    temporary.replace(path)


def _points(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    lines = [line for line in metrics if line.get(name) is not None]
    return [line["step"] for line in lines], [line[name] for line in lines]


def _smoothed(values: Sequence[float]) -> list[float]:
    """An exponential average, corrected for its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(total / weight)
    return smoothed


def _finish(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
