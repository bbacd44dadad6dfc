"""Verdict on whether a step fits a device, and remedies where it does not."""

from typing import Any, Final

from floragrad._text import format_bytes
from floragrad.cli.plan.result import OptimizerPlan, PlanSettings
from floragrad.cli.plan.sizes import Size

WORDS: Final = {
    "parameters": "parameters",
    "gradients": "gradients",
    "accumulation": "accumulation buffers",
    "optimizer_state": "optimizer state",
    "activations": "activations",
    "temporaries": "temporaries",
    "buckets": "buckets",
}
"""The categories as they are called and ordered on the screen."""
LARGE: Final = 0.25
"""Fraction of the peak that is worth shrinking, even where that alone is not enough."""
ENOUGH: Final = 2
"""Multiple of the excess: of so much, half is enough."""


def verdict(name: str, row: OptimizerPlan, settings: PlanSettings, device: Size, reads_text: bool = True) -> str:
    """Return one line: the bytes to spare, or the peak and the remedies.

    Args:
        name: The optimizer.
        row: Its plan.
        settings: Of the plan.
        device: The memory there is.
        reads_text: Whether the model reads sequences of tokens.

    Example:
        >>> bytes_at_peak = {"parameters": 10_000_000_000, "activations": 20_000_000_000}
        >>> row = OptimizerPlan(
        ...     parameters=10_000_000_000, optimizer_state=0, accumulation=0, gradients=0, buckets=0,
        ...     activations=20_000_000_000, temporaries=0, peak=30_000_000_000, peak_moment="backward",
        ...     at_peak=bytes_at_peak, timeline=(),
        ... )
        >>> verdict("flora", row, PlanSettings(), Size(24_000_000_000, "24 GB"))
        'does not fit 24 GB, by 6.0 GB: the peak is the activations, try --checkpointing'
        >>> verdict("flora", row, PlanSettings(), Size(32_000_000_000, "32 GB"))
        'fits 32 GB with 2.0 GB to spare'
    """
    spare = device.nbytes - row.peak
    if spare >= 0:
        return f"fits {device.words} with {format_bytes(spare)} to spare"
    held, way = _way_out(name, row, settings, -spare, reads_text)
    return (
        f"does not fit {device.words}, by {format_bytes(-spare)}: the peak is the "
        f"{' and the '.join(WORDS[category] for category in held)}, try {way}"
    )


def verdict_json(row: OptimizerPlan, device: Size) -> dict[str, Any]:
    """Return the verdict in plain types."""
    return {"fits": row.peak <= device.nbytes, "spare": device.nbytes - row.peak}


def _way_out(
    name: str, row: OptimizerPlan, settings: PlanSettings, over: int, reads_text: bool
) -> tuple[list[str], str]:
    """Return the largest category at the peak, the largest one with a remedy, and the remedy."""
    descending = sorted(row.at_peak, key=lambda category: -row.at_peak[category])
    worth = min(LARGE * row.peak, ENOUGH * over)
    for category in descending:
        for undone, way in _ways(category, name, settings, reads_text):
            if undone and (row.at_peak[category] >= worth or category == descending[0]):
                return list(dict.fromkeys((descending[0], category))), way
    return descending[:1], f"--fsdp {settings.ddp}" if settings.ddp > 1 else f"--fsdp {2 * settings.fsdp}"


def _ways(category: str, name: str, settings: PlanSettings, reads_text: bool) -> list[tuple[bool, str]]:
    """Return the remedies that make a category smaller, the best first, and whether each is not applied yet."""
    flora = name.startswith("flora")
    waits = settings.ddp > 1 or settings.defer_reduction  # with the update until gradients are averaged
    least = "flora+accumulator" if waits else "flora+release"
    ways = {
        "parameters": [(settings.dtype == "float32", "--dtype bfloat16")],
        "gradients": [(name not in ("flora+release", least), least)],
        "accumulation": [(name != "flora+release" and settings.accumulate == 1 and not waits, "flora+release")],
        "optimizer_state": [(not flora, "flora"), (settings.state_dtype != "int4", "--state-dtype int4")],
        "activations": [
            (not settings.checkpointing, "--checkpointing"),
            (settings.batch > 1, "a smaller --batch"),
            (reads_text, "a shorter --sequence-length"),
        ],
        "temporaries": [(not flora, "flora")],
    }
    return ways.get(category, [])
