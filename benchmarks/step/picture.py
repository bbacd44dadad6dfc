"""Step time and state bytes over the model's size and over the rank, drawn."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.step.optimizers import COPY, FUSED, RANKED, RANKS, at_rank
from benchmarks.step.plan import OVER_SIZES
from benchmarks.step.shapes import LAYERS, WIDTHS, layers_of_width, parameters

COLOURS: Final = ("#5e81ac", "#bf616a", "#a3be8c", "#b48ead", "#d08770")
LIMIT: Final[dict[str, Any]] = {"color": "#222222", "linestyle": "--", "linewidth": 1.0, "label": COPY}


def growth_figure(results: Mapping[str, Any]) -> Figure | None:
    """Four panels; None where the growth was not measured."""
    runs = {run["part"]: run for run in results["runs"]}
    if not {"sizes", "ranks"} <= set(runs):
        return None
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    for row, (key, unit, label) in enumerate(
        (("ratio", 1.0, f"step time\n{FUSED} on GPT-2 small's layers: 1"), ("state_bytes", 1e6, "state (MB)"))
    ):
        _over_sizes(panels[row][0], runs["sizes"], key, unit)
        _over_ranks(panels[row][1], runs["ranks"], key, unit)
        panels[row][0].set_ylabel(label)
        for panel in panels[row]:
            if panel.get_legend_handles_labels()[0]:
                panel.legend(frameon=False, fontsize=8)
    about = results["about"]
    where = f"{about['processor']}, threads: {runs['sizes']['threads']}, commit {about['commit']}"
    figure.suptitle(where, x=0.01, ha="left", fontsize=9)
    return figure


def save(results: Mapping[str, Any], path: Path) -> bool:
    """Write the picture; whether there was anything to draw."""
    figure = growth_figure(results)
    if figure is not None:
        figure.savefig(path, dpi=150)
    return figure is not None


def _lookup(run: Mapping[str, Any], key: str, unit: float) -> Callable[[str, str], float | None]:
    found = {(row["name"], row["shapes"]): row.get(key) for row in run["rows"]}

    def look(name: str, shapes: str) -> float | None:
        value = found.get((name, shapes))
        return None if value is None else value / unit

    return look


def _line(panel: Axes, points: Sequence[tuple[float, float | None]], **style: Any) -> None:
    known = [(x, y) for x, y in points if y is not None]
    if known:
        panel.plot(*zip(*known, strict=True), **style)


def _over_sizes(panel: Axes, run: Mapping[str, Any], key: str, unit: float) -> None:
    look = _lookup(run, key, unit)
    shapes = [layers_of_width(width) for width in WIDTHS]
    counts = [parameters(name) / 1e6 for name in shapes]
    for name, colour in zip((each for each in OVER_SIZES if each != COPY), COLOURS, strict=True):
        points = [(count, look(name, each)) for count, each in zip(counts, shapes, strict=True)]
        _line(panel, points, color=colour, marker="o", label=name)
    if key == "ratio":
        _line(panel, [(count, look(COPY, each)) for count, each in zip(counts, shapes, strict=True)], **LIMIT)
    panel.set(xscale="log", yscale="log", xlabel="millions of parameters (GPT-2's layers of four widths)")
    panel.set_xticks(counts, [f"{count:.0f}" for count in counts])
    panel.minorticks_off()


def _over_ranks(panel: Axes, run: Mapping[str, Any], key: str, unit: float) -> None:
    look = _lookup(run, key, unit)
    for name, colour in zip(RANKED, (COLOURS[1], COLOURS[2], COLOURS[4]), strict=True):
        points = [(rank, look(at_rank(name, rank), LAYERS)) for rank in RANKS]
        _line(panel, points, color=colour, marker="o", label=name)
    limit = look(COPY, LAYERS)
    if key == "ratio" and limit is not None:
        panel.axhline(limit, **LIMIT)
    panel.set(xscale="log", yscale="log", xlabel="rank (GPT-2 small's layers)")
    panel.set_xticks(RANKS, [str(rank) for rank in RANKS])
    panel.minorticks_off()
