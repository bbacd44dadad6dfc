"""A window's position and sketches, saved and taken up again."""

from dataclasses import replace
from typing import Any, Final

from floragrad.torch.accumulation.settings import Settings
from floragrad.torch.accumulation.slots import Slots
from floragrad.torch.accumulation.window import Window
from floragrad.torch.distributed.collectives import Ranks
from floragrad.torch.storage import repacked_int4

_PACKING: Final = "pairs"
"""Columns 2j and 2j + 1 share a byte; windows of version 0.1 name no packing and have halves."""


def window_state(window: Window, slots: Slots, settings: Settings, ranks: Ranks | None) -> dict[str, Any]:
    """What another process needs to go on; between two windows the position, and the sizes of the columns."""
    sketches = {slot.index: slot.sketch.state_dict() for slot in slots if slot.sketch}
    return {
        "settings": settings.saved(slots.device),
        "window": window.number,
        "seen": window.seen,
        "dropped": window.dropped,
        "weighted": window.weighted,
        "ended": window.ended,
        "total": window.total,
        "rank": _place(ranks, slots),
        "int4_packing": _PACKING,
        "sketches": {index: saved for index, saved in sketches.items() if saved.keys() > {"folds"}},
    }


def check_window(state: dict[str, Any], slots: Slots, settings: Settings, ranks: Ranks | None) -> None:
    """Refuse a window that cannot be finished here; nothing has been changed then.

    Raises:
        ValueError: It was begun with other settings, over another model, or by another rank.
    """
    if state["seen"] or state["ended"]:
        settings.check_saved(state["settings"], slots.device)
        rank, size = _place(ranks, slots)
        if state["rank"] != [rank, size]:
            raise ValueError(
                f"the saved window is rank {state['rank'][0]}'s of {state['rank'][1]}, this is rank "
                f"{rank} of {size}: let each rank load what it saved itself, or load a state "
                "that was saved between two windows"
            )
    here = {slot.index: slot for slot in slots}
    # What is saved between two windows are sizes of columns: of use where they fit, and in nobody's way.
    gradients = {index: saved for index, saved in state["sketches"].items() if saved["folds"]}
    for index, saved in gradients.items():
        sketch = here[index].sketch if index in here else None
        if sketch is None:
            raise ValueError(
                f"the saved window holds a gradient of parameter {index}, which is not trained here: "
                "load the state that was saved with this model"
            )
        sketch.check_loadable(saved, here[index].name)


def load_window(state: dict[str, Any], slots: Slots, fresh: Window) -> Window:
    """Fill the sketches from a checked state; the window as it was, in place of a fresh one."""
    for slot in slots:
        if slot.sketch is not None and slot.index in state["sketches"]:
            saved = state["sketches"][slot.index]
            if "int4_packing" not in state and "data" in saved and slot.sketch.plan.state_dtype == "int4":
                saved = {**saved, "data": repacked_int4(saved["data"], slot.sketch.plan.width)}  # of version 0.1
            slot.sketch.load_state_dict(saved)
    kept = {key: state[key] for key in ("seen", "weighted", "ended", "total")}
    return replace(fresh, number=state["window"], dropped=state.get("dropped", 0), **kept)


def _place(ranks: Ranks | None, slots: Slots) -> list[int]:
    """This process among those that have other sketches, and how many they are."""
    if ranks is None and any(slot.part is not None for slot in slots):
        ranks = Ranks.of(None)
    return [0, 1] if ranks is None else [ranks.rank, ranks.size]
