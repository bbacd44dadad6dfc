"""Opening of a run: the optimizer's state before the first step."""

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from floragrad._text import format_bytes, format_table
from floragrad.cli.train.config import RunConfig


def opening(config: RunConfig, report: Any, sizes: Mapping[str, int]) -> str:
    """Describe the optimizer's state, and how gradients are gathered where they are.

    Args:
        config: Of the run.
        report: Flora's; None for the other optimizers.
        sizes: In bytes, by their names in the summary.
    """
    whole = sizes["adamw_state_bytes"]
    if report is not None:
        said = _condensed(report)
    elif config.optimizer == "adamw":
        said = f"AdamW compresses nothing: two elements for every parameter, {format_bytes(whole)} of state"
    elif config.optimizer == "adafactor":
        said = (
            "Adafactor keeps rows and columns of the second moment, and one element of momentum for every "
            f"parameter: at least {format_bytes(whole / 2)} of state, AdamW {format_bytes(whole)}"
        )
    else:
        said = f"{config.optimizer} trains; AdamW's state for the same parameters is {format_bytes(whole)}"
    return said if config.micro_batches == 1 else f"{said}\n{_accumulation_line(config, sizes)}"


def _accumulation_line(config: RunConfig, sizes: Mapping[str, int]) -> str:
    """Describe how the gradients of several micro-batches are gathered, and in how many bytes."""
    kept, exact = sizes["accumulation_bytes"], sizes["gradient_bytes"]
    if config.accumulator == "exact":
        return f"gradients of {config.micro_batches} micro-batches are gathered exactly: {format_bytes(kept)}"
    projected = "" if config.accumulator_ratio == 1 else f" of one element for {config.accumulator_ratio} columns"
    return (
        f"gradients of {config.micro_batches} micro-batches are gathered as {config.accumulator_dtype} "
        f"sketches{projected}: {format_bytes(kept)}, {kept / exact:.1%} of the gradients' {format_bytes(exact)}"
    )


def _condensed(report: Any) -> str:
    """Flora's report with one line for the tensors that differ in their layer's number only."""
    like = groupby(sorted(report.rows, key=_likeness), key=_likeness)
    lines = [("tensors", "shape", "count", "ρ", "state", "momentum")]
    for (kept, name, shape, ratio), group in like:
        rows = list(group)
        size = format_bytes(sum(row.state_bytes for row in rows))
        sketched = rows[0].momentum == "sketch"
        dimensions = " x ".join(map(str, shape))
        lines.append((name, dimensions, str(len(rows)), str(ratio) if sketched else "", size, kept))
    total = (
        f"Flora keeps a sketch of the momentum of {report.compressed} of {len(report.rows)} tensors: "
        f"{format_bytes(report.state_bytes)} of state, {report.state_bytes / report.adamw_bytes:.1%} of AdamW's "
        f"{format_bytes(report.adamw_bytes)}, {report.state_bytes / report.adafactor_bytes:.1%} of Adafactor's "
        f"{format_bytes(report.adafactor_bytes)}"
    )
    return "\n".join([*format_table(lines), total])


def _likeness(row: Any) -> tuple[str, str, tuple[int, ...], int]:
    kept = "a sketch" if row.momentum == "sketch" else row.reason
    return kept, re.sub(r"\d+", "*", row.name), row.shape, row.ratio
