"""Formatting of bytes and tables."""

from collections.abc import Sequence


def format_bytes(count: float) -> str:
    """Format bytes in the largest decimal unit with a value of at least 1: ``"1.5 MB"``."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def format_table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Format cells as the lines of a table, with the first row as header; the last column is not padded."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]) for line in cells
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return lines
