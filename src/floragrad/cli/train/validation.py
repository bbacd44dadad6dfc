"""Error of a validation loss over blocks, and the words for it."""

from collections.abc import Mapping, Sequence
from math import isfinite, nan, sqrt
from statistics import stdev
from typing import Any

NOTHING = "–"
"""A cell without a value."""


def standard_error(losses: Sequence[float]) -> float | None:
    """Return the standard error of the mean over blocks, s/√n; None of a single one, NaN where a loss is not finite."""
    if len(losses) < 2:
        return None
    return stdev(losses) / sqrt(len(losses)) if all(map(isfinite, losses)) else nan


def difference(row: Mapping[str, Any]) -> str:
    """Return a row's loss beyond the yardstick's, ± its standard error over the validation blocks."""
    if row["difference"] is None:
        return NOTHING
    error = row["difference_standard_error"]
    sign = "−" if row["difference"] < 0 else "+"
    return f"{sign}{abs(row['difference']):.4f}" + ("" if error is None else f" ± {error:.4f}")


def validation_notes(rows: Sequence[Mapping[str, Any]], of: str) -> list[str]:
    """Describe the blocks that the losses were measured on, and their errors."""
    row = next((row for row in rows if row.get("validation_blocks")), None)
    if row is None:
        return []
    return [
        f"validated on {row['validation_blocks']:,} of {row['held_out_blocks']:,} held-out blocks, drawn from all "
        "held-out documents, the same for all",
        "error over blocks: the standard error of the loss for the choice of blocks, which all share; of what is "
        f"minus {of}'s: of the differences block by block",
    ]
