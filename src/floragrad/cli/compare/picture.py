"""The pictures of a comparison: losses over steps beside bytes of state, and loss over bytes of state."""

from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from math import floor, log10
from typing import Any, Final, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from floragrad._text import format_bytes
from floragrad.cli.compare.table import Best
from floragrad.cli.figures import COLOUR, finish, points_of, smoothed
from floragrad.cli.methods import METHODS
from floragrad.cli.options import LARGEST_INTEGER

LINES: Final = ("flora-none", "flora-full")
"""Methods that are drawn as horizontal lines."""
LABEL_GAP: Final = 0.035
"""Least distance of two labels, as a share of the picture's height."""
NEAR: Final = 0.16
"""Labels of points that are closer than this share of the width may meet."""
COLOURS = {"flora": COLOUR, "adamw": "#c4572e", "adafactor": "#4464ad"}
OTHER_COLOURS = [matplotlib.colormaps["tab20"](index) for index in range(20)]
"""Of other methods, in turn."""
ACCUMULATORS = {"flora": "-", "exact": "--", "none": ":"}
"""By accumulator, where gradients are gathered."""
MOST_UPRIGHT = 4
"""Beyond so many bars their names and sizes are written from bottom to top, and the legend is small."""


class Point(NamedTuple):
    """A row of the table in the picture."""

    label: str
    bytes: float
    loss: float
    spread: float


class Picture(NamedTuple):
    """What is drawn.

    Attributes:
        curves: Flora's rows that differ only in their ratio, by ascending bytes.
        rivals: All other rows.
        lines: Flora without momentum, and with all of it.
    """

    curves: dict[str, list[Point]]
    rivals: list[Point]
    lines: list[Point]


def picture(bests: Sequence[Best]) -> Picture:
    """Sort the rows that did not diverge."""
    found = Picture({}, [], [])
    for best in bests:
        if best.loss is None or best.bytes_per_hidden_parameter is None:
            continue
        point = Point(best.label, best.bytes_per_hidden_parameter, best.loss, best.spread or 0.0)
        if best.optimizer in LINES:
            found.lines.append(point)
        elif METHODS[best.optimizer].is_flora:
            found.curves.setdefault(_curve(best), []).append(point)
        else:
            found.rivals.append(point)
    for points in found.curves.values():
        points.sort(key=lambda point: point.bytes)
    return found


def _curve(best: Best) -> str:
    """Name everything but the ratio."""
    config, written = best.config, ("rank", "ratio", "state_dtype", "projection", "kappa")
    others = [each for each in config.set if each.partition("=")[0] not in written]
    kappa = "never" if config.kappa == LARGEST_INTEGER else config.kappa
    gathered = [config.label.partition(", ")[2]] if config.accumulate > 1 else []
    return ", ".join([f"{config.optimizer} {config.state_dtype} {config.projection} κ={kappa}", *others, *gathered])


def state_figure(found: Picture, title: str) -> Figure:
    """Draw the losses over the bytes, on a logarithmic axis that has room for 0."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    points = [*found.rivals, *(point for curve in found.curves.values() for point in curve)]
    positive = [point.bytes for point in points if point.bytes > 0]
    linear = 10.0 ** floor(log10(min(positive, default=1.0)))
    axes.set_xscale("symlog", linthresh=linear, linscale=0.6)
    for name, curve in found.curves.items():
        axes.errorbar(*_columns(curve), label=name, marker="o", markersize=4, capsize=2, linewidth=1.4)
    for point, dash in zip(found.lines, ("--", ":", "-."), strict=False):
        axes.axhline(point.loss, color="#777777", linestyle=dash, linewidth=1.2, label=point.label)
    if found.rivals:
        axes.errorbar(*_columns(found.rivals), fmt="D", color="#222222", markersize=4, capsize=2, linewidth=0.8)
    axes.set_xlim(left=-0.2 * linear, right=3 * max(positive, default=1.0))
    axes.margins(y=0.08)
    _label(axes, found.rivals)
    finish(axes, "bytes of optimizer state per element of the hidden matrices", "validation loss (nats)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(title, loc="left", fontsize=10)
    if found.curves or found.lines:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float], list[float]]:
    return [point.bytes for point in points], [point.loss for point in points], [point.spread for point in points]


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Write the rivals' names beside them, those of neighbours one above the other."""
    axes.autoscale_view()  # the shares are of the final limits
    to_share = axes.transData + axes.transAxes.inverted()
    placed: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: point.loss):
        x, y = to_share.transform((point.bytes, point.loss))
        near = [other for at, other in placed if abs(at - x) < NEAR]
        y = max([y, *(other + LABEL_GAP for other in near)])
        placed.append((x, y))
        arrow: dict[str, Any] = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5}
        axes.annotate(
            point.label,
            (point.bytes, point.loss),
            (x + 0.012, y),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops=arrow,
        )


def comparison_figure(bests: Sequence[Best], title: str) -> Figure:
    """Draw each row's losses over the steps, and beside them a bar of its state between micro-batches."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    losses, bars = figure.subplots(1, 2, width_ratios=[2.2, 1])
    gathers = any(each.about["accumulation_bytes"] for each in bests)
    many = len(bests) > MOST_UPRIGHT
    colours = _colours(bests)
    for each, colour in zip(bests, colours, strict=True):
        line, metrics = ACCUMULATORS[each.config.accumulator] if gathers else "-", each.metrics
        steps, values = points_of(metrics, "loss")
        losses.plot(steps, smoothed(values), line, color=colour, alpha=0.35, linewidth=1)
        points = points_of(metrics, "validation_loss")
        losses.plot(*points, f"o{line}", color=colour, markersize=4, linewidth=1.4, label=each.label)
    losses.set_title("validation loss (dots), training loss (pale)", loc="left", fontsize=10)
    finish(losses)
    losses.legend(frameon=False, **({"fontsize": 7, "ncols": 3, "loc": "upper right"} if many else {}))
    names = [each.label.replace(", ", ",\n") for each in bests]
    sizes = [(each.about["optimizer_state_bytes"], each.about["accumulation_bytes"]) for each in bests]
    states, gathered = ([size / 1e6 for size in part] for part in zip(*sizes, strict=True))
    drawn = bars.bar(names, states, color=colours)
    if gathers:
        drawn = bars.bar(names, gathered, bottom=states, color=colours, alpha=0.4)
    labels: dict[str, Any] = {"fontsize": 7, "rotation": 90} if many else {"fontsize": 9}
    bars.bar_label(drawn, [format_bytes(sum(size)) for size in sizes], **labels, padding=2)
    what = "optimizer state, and gathered gradients (pale)" if gathers else "optimizer state, measured"
    bars.set_title(what, loc="left", fontsize=10)
    bars.tick_params(axis="x", labelsize=8, labelrotation=90 if many else 0)
    bars.margins(y=0.25 if many else 0.05)
    bars.set_ylabel("MB")
    bars.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _colours(bests: Sequence[Best]) -> list[Any]:
    """Return a colour for each: the method's own where no other row has it, else the next free one."""
    others, found = cycle(OTHER_COLOURS), []
    known = Counter((each.optimizer, each.config.accumulator) for each in bests)
    for each in bests:
        own = COLOURS.get(each.optimizer) if known[each.optimizer, each.config.accumulator] == 1 else None
        found.append(own or next(others))
    return found
