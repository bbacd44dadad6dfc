"""``--picture``: live bytes over one step, by category, a panel for each optimizer."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from floragrad._text import format_bytes
from floragrad.planning.result import CATEGORIES, MemoryPlan, OptimizerPlan, Sample
from floragrad.planning.sizes import Size
from floragrad.planning.verdict import WORDS

COLOURS = {
    "parameters": "#4c566a",
    "optimizer_state": "#5e81ac",
    "accumulation": "#a3be8c",
    "gradients": "#bf616a",
    "buckets": "#b48ead",
    "activations": "#d8dee9",
    "temporaries": "#d08770",
}
PANELS_IN_A_ROW = 4


def plan_figure(plan: MemoryPlan, heading: str, device: Size | None = None) -> Figure:
    """Live bytes over one step in the steady state, stacked by category, all panels on one scale.

    Args:
        plan: What to draw.
        heading: Over the picture.
        device: Memory to draw a line at.
    """
    count = len(plan.optimizers)
    columns = min(count, PANELS_IN_A_ROW)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.2 * columns + 1.6, 2.9 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel, (name, row) in zip(panels, plan.optimizers.items(), strict=False):
        _draw(panel, row)
        panel.set_title(f"{name}: {format_bytes(row.peak)}", loc="left", fontsize=10)
        if device is not None:
            panel.axhline(device.nbytes / 1e9, color="#222222", linestyle="--", linewidth=0.9, label=device.words)
    for panel in panels[count:]:
        panel.set_axis_off()
    for row_number in range(rows):
        panels[row_number * columns].set_ylabel("live bytes (GB)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    figure.suptitle(heading, x=0.01, ha="left")
    return figure


def _draw(panel: Axes, row: OptimizerPlan) -> None:
    """One optimizer's step, with a dot at its peak."""
    samples = row.timeline
    layers = [[sample.bytes[position] / 1e9 for sample in samples] for position in range(len(CATEGORIES))]
    labels = [WORDS[category] for category in CATEGORIES]
    colours = [COLOURS[category] for category in CATEGORIES]
    panel.stackplot(range(len(samples)), layers, labels=labels, colors=colours, linewidth=0)
    highest = max(range(len(samples)), key=lambda number: samples[number].total)
    panel.plot(highest, samples[highest].total / 1e9, "o", color="#222222", markersize=4)
    starts = _phases(samples)
    panel.set_xticks(list(starts), list(starts.values()), fontsize=7, rotation=45, ha="left")
    panel.set_xlim(0, max(1, len(samples) - 1))
    panel.spines[["top", "right"]].set_visible(False)


def _phases(samples: Sequence[Sample]) -> dict[int, str]:
    """Where forward, backward and update begin, by the first word of their moments; each only the first time."""
    starts: dict[str, int] = {}
    for number, sample in enumerate(samples):
        starts.setdefault(sample.moment.partition(" ")[0], number)
    return {number: phase for phase, number in starts.items()}
