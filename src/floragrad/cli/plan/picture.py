"""``--picture``: live bytes over one step, by category, a panel for each optimizer."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from floragrad._text import format_bytes
from floragrad.cli.plan.result import CATEGORIES, MemoryPlan, OptimizerPlan, Sample
from floragrad.cli.plan.sizes import Size
from floragrad.cli.plan.verdict import WORDS

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
STARTS = {"the batch": "forward", "forward": "forward", "backward": "backward", "clipping": "update"}
"""Prefixes of moments that begin a pass, and the pass."""
STEP_BEGINS_WITH = "forward"
MOST_LABELS = 3
"""The passes of more than one micro-batch are too narrow for labels."""


def plan_figure(plan: MemoryPlan, heading: str, device: Size | None = None) -> Figure:
    """Live bytes over one step in the steady state, stacked by category, all panels on one scale.

    Args:
        plan: The plan.
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
    micro_batches = "a micro-batch" if plan.settings.accumulate == 1 else f"{plan.settings.accumulate} micro-batches"
    figure.supxlabel(f"one step: {micro_batches} forward and backward, then clipping and update", fontsize=9)
    return figure


def _draw(panel: Axes, row: OptimizerPlan) -> None:
    """One optimizer's step, with a dot at its highest moment. Every pass is as wide as any other."""
    samples = row.timeline
    passes = _passes(samples)
    places = [number + place / len(run) for number, (_, run) in enumerate(passes) for place in range(len(run))]
    layers = [[sample.bytes[position] / 1e9 for sample in samples] for position in range(len(CATEGORIES))]
    labels = [WORDS[category] for category in CATEGORIES]
    colours = [COLOURS[category] for category in CATEGORIES]
    panel.stackplot(places, layers, labels=labels, colors=colours, linewidth=0)
    highest = max(range(len(samples)), key=lambda number: samples[number].total)
    panel.plot(places[highest], samples[highest].total / 1e9, "o", color="#222222", markersize=4)
    shown = passes if len(passes) <= MOST_LABELS else []
    panel.set_xticks([number + 0.5 for number in range(len(shown))], [name for name, _ in shown], fontsize=8)
    panel.tick_params(axis="x", length=0)
    panel.set_xlim(0, places[-1] or 1)
    panel.spines[["top", "right"]].set_visible(False)


def _passes(samples: Sequence[Sample]) -> list[tuple[str, list[Sample]]]:
    """Return a step cut where a forward pass, a backward pass or the update of all tensors begins.

    Folds and updates during a backward pass belong to it.
    """
    passes: list[tuple[str, list[Sample]]] = []
    for sample in samples:
        begun = next((name for start, name in STARTS.items() if sample.moment.startswith(start)), None)
        if not passes or (begun is not None and begun != passes[-1][0]):
            passes.append((begun or STEP_BEGINS_WITH, []))
        passes[-1][1].append(sample)
    return passes
