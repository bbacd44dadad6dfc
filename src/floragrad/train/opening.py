"""What is said of the optimizer before the first step."""

import re
from itertools import groupby
from typing import Any

import torch

from floragrad import Flora
from floragrad.train.display import megabytes
from floragrad.train.optimizers import adamw_bytes


def opening_report(optimizer: torch.optim.Optimizer) -> str:
    """What the optimizer compresses and what it will keep, like tensors of all layers in one line."""
    if isinstance(optimizer, Flora):
        return _condensed(optimizer.report())
    whole = adamw_bytes(optimizer)
    if isinstance(optimizer, torch.optim.AdamW):
        return f"AdamW compresses nothing: two numbers for every parameter, {megabytes(whole)} of state"
    return (
        "Adafactor keeps rows and columns of the second moment, and one number of momentum for every "
        f"parameter: at least {megabytes(whole / 2)} of state, AdamW {megabytes(whole)}"
    )


def _condensed(report: Any) -> str:
    """Flora's report with one line for the tensors that differ in their layer's number only."""
    like = groupby(sorted(report.rows, key=_likeness), key=_likeness)
    lines = [("tensors", "shape", "count", "ρ", "state", "momentum")]
    for (kept, name, shape, ratio), group in like:
        rows = list(group)
        size = megabytes(sum(row.state_bytes for row in rows))
        sketched = rows[0].momentum == "sketch"
        dimensions = " x ".join(map(str, shape))
        lines.append((name, dimensions, str(len(rows)), str(ratio) if sketched else "", size, kept))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    total = (
        f"Flora keeps a sketch of the momentum of {report.compressed} of {len(report.rows)} tensors: "
        f"{megabytes(report.state_bytes)} of state, {report.state_bytes / report.adamw_bytes:.1%} of AdamW's "
        f"{megabytes(report.adamw_bytes)}, {report.state_bytes / report.adafactor_bytes:.1%} of Adafactor's "
        f"{megabytes(report.adafactor_bytes)}"
    )
    return "\n".join([*map(str.rstrip, table), total])


def _likeness(row: Any) -> tuple[str, str, tuple[int, ...], int]:
    kept = "a sketch" if row.momentum == "sketch" else row.reason
    return kept, re.sub(r"\d+", "*", row.name), row.shape, row.ratio
