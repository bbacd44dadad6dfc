"""A window that several processes end together."""

from zlib import crc32

from floragrad.torch.accumulation.exchange import sum_sketches
from floragrad.torch.accumulation.settings import Settings
from floragrad.torch.accumulation.slots import Slots
from floragrad.torch.accumulation.window import Window
from floragrad.torch.distributed.collectives import Ranks


def share_window(window: Window, slots: Slots, settings: Settings, ranks: Ranks) -> bool:
    """Leave the sum of all ranks' sketches in every rank's, and their number of micro-batches in the window.

    A rank that has had no micro-batch takes part with zeros.

    Args:
        window: This rank's.
        slots: The parameters; their sketches are summed.
        settings: What fixes the sketches.
        ranks: Who trains.

    Returns:
        False where no rank has had a micro-batch: there is no window to end.

    Raises:
        RuntimeError: The ranks do not train the same, on all of them alike.
        ValueError: Some ranks have given weights and some have not, on all of them alike.
    """
    layout = crc32(repr((settings, [(slot.index, slot.plan) for slot in slots])).encode())
    said = ranks.gather([layout, window.number, window.kept, bool(window.weighted)], slots.device)
    _check_alike([each[0] for each in said], "parameters or options of the accumulator (as checksums)")
    begun = [each for each in said if each[2]]
    # A rank without a micro-batch may have dropped fewer windows: it has nothing that depends on the number.
    _check_alike([each[1] for each in begun], "the number of the window")
    if len({each[3] for each in begun}) > 1:
        raise ValueError(
            f"weights are given on some ranks only ({[bool(each[3]) for each in said]}): give one for every "
            "micro-batch of a window on all ranks, or for none"
        )
    if not begun:
        return False
    window.number, window.weighted = begun[0][1], bool(begun[0][3])
    window.total = sum(each[2] for each in begun)
    sketched = [(slot, slot.sketch) for slot in slots if slot.sketch is not None]
    held = ranks.any([sketch.folds > 0 for _, sketch in sketched], slots.device)
    joined = [each for each, somewhere in zip(sketched, held, strict=True) if somewhere]
    for slot, sketch in joined:
        sketch.join(slot.param.device)
    sum_sketches([sketch for _, sketch in joined], window.number, ranks)
    return True


def _check_alike(said: list[int], what: str) -> None:
    if len(set(said)) > 1:
        raise RuntimeError(
            f"the ranks differ in {what}: {said}; construct their accumulators alike, over the same parameters in "
            "the same order, and let all of them end, drop and load the same windows"
        )
