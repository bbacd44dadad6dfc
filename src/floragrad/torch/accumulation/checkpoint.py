"""Saving and loading of a window: its position and its sketches."""

from dataclasses import replace
from typing import Any, Final

from floragrad.torch.accumulation.entries import ParamEntries
from floragrad.torch.accumulation.settings import Settings
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.accumulation.window import ParamEntry, Window
from floragrad.torch.distributed.collectives import Ranks
from floragrad.torch.storage import repacked_int4

_PACKING: Final = "pairs"
"""Columns 2j and 2j + 1 share a byte; windows of version 0.1 name no packing and have halves."""


def window_state(window: Window, entries: ParamEntries, settings: Settings, ranks: Ranks | None) -> dict[str, Any]:
    """Return the state of a window; between two windows its position, and the sizes of the columns."""
    sketches = {entry.tensor_id: entry.held.state_dict() for entry in entries if entry.held}
    return {
        "settings": settings.saved(entries.device),
        "window": window.index,
        "seen": window.seen,
        "dropped": window.dropped,
        "weighted": window.weighted,
        "ended": window.ended,
        "total": window.total,
        "rank": _place(ranks, entries),
        "int4_packing": _PACKING,
        "sketches": {tensor_id: saved for tensor_id, saved in sketches.items() if saved.keys() > {"folds"}},
    }


def check_window(state: dict[str, Any], entries: ParamEntries, settings: Settings, ranks: Ranks | None) -> None:
    """Refuse a window that this accumulator cannot finish; nothing has been changed then.

    Raises:
        ValueError: It was begun with other settings, over another model, or by another rank.
    """
    if state["seen"] or state["ended"]:
        settings.check_saved(state["settings"], entries.device)
        rank, size = _place(ranks, entries)
        if state["rank"] != [rank, size]:
            raise ValueError(
                f"the saved window is rank {state['rank'][0]}'s of {state['rank'][1]}, this is rank "
                f"{rank} of {size}: load each rank's own state, or a state "
                "that was saved between two windows"
            )
    by_id = {entry.tensor_id: entry for entry in entries}
    # Sizes of columns, which are saved between two windows, are loaded where they fit and ignored elsewhere.
    gradients = {tensor_id: saved for tensor_id, saved in state["sketches"].items() if saved["folds"]}
    for tensor_id, saved in gradients.items():
        sketch = _holder(state, by_id[tensor_id]) if tensor_id in by_id else None
        if sketch is None:
            raise ValueError(
                f"the saved window holds a gradient of parameter {tensor_id}, which is not trained here: "
                "load the state that was saved with this model"
            )
        sketch.check_loadable(saved, by_id[tensor_id].name)


def load_window(state: dict[str, Any], entries: ParamEntries, fresh: Window) -> Window:
    """Load the sketches from a checked state, and return its window in place of a fresh one."""
    for entry in entries:
        sketch = _holder(state, entry)
        if sketch is not None and entry.tensor_id in state["sketches"]:
            saved = state["sketches"][entry.tensor_id]
            if "int4_packing" not in state and "data" in saved and sketch.plan.state_dtype == "int4":
                saved = {**saved, "data": repacked_int4(saved["data"], sketch.plan.width)}  # of version 0.1
            sketch.load_state_dict(saved)
    kept = {key: state[key] for key in ("seen", "weighted", "ended", "total")}
    return replace(fresh, index=state["window"], dropped=state.get("dropped", 0), **kept)


def _holder(state: dict[str, Any], entry: ParamEntry) -> GradientSketch | None:
    """Return the sketch that the saved one is loaded into."""
    is_reduced = state["ended"] or not state["seen"]
    return entry.sketch if is_reduced or entry.unreduced is None else entry.unreduced


def _place(ranks: Ranks | None, entries: ParamEntries) -> list[int]:
    """Return the rank and the number of processes whose sketches differ: replicas, or all where tensors are split."""
    if any(entry.part is not None for entry in entries):
        ranks = Ranks.from_group(None)
    return [0, 1] if ranks is None else [ranks.rank, ranks.size]
