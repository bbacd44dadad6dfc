"""Which workers live at the same time: as many as fit into memory, and always the one that all are compared with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from benchmarks.step.optimizers import ALL
from benchmarks.step.shapes import largest, parameters

Name = TypeVar("Name")
ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2}
PROCESS_BYTES: Final = 600_000_000
"""Of a worker without tensors: torch, and the libraries that peers import."""
COMPILER_BYTES: Final = 1_200_000_000
"""The same with a compiler and its helpers."""
BUFFERS: Final = 4
"""Float32 buffers of the largest tensor that a step may take beside what its row says."""


@dataclass(frozen=True)
class Subject:
    """What one worker is about.

    Attributes:
        entry: A row of the table of optimizers.
        shapes: The name of what it steps.
    """

    entry: str
    shapes: str


def needed_bytes(subject: Subject, dtype: str) -> int:
    """Memory of a worker, rather too much."""
    entry, count = ALL[subject.entry], parameters(subject.shapes)
    process = COMPILER_BYTES if entry.is_compiled else PROCESS_BYTES
    tensors = round(count * (2 * ITEM_BYTES[dtype] + entry.held))
    return process + tensors + 4 * BUFFERS * largest(subject.shapes)


def batches(needed: Mapping[Name, int], reference: Name, available: int) -> tuple[list[list[Name]], list[Name]]:
    """Put workers together that fit into memory, each time with the reference.

    Args:
        needed: Bytes of each worker, the reference's too.
        reference: The one that is in every batch.
        available: Bytes of all workers together.

    Returns:
        The batches, in order, the reference first in each; and those that do not fit even alone with it.

    Example:
        >>> batches({"a": 4, "b": 3, "c": 3, "d": 9}, "a", 10)
        ([['a', 'b', 'c']], ['d'])
    """
    found: list[list[Name]] = []
    rest: list[int] = []
    without: list[Name] = []
    free = available - needed[reference]
    for name, size in needed.items():
        if name == reference:
            continue
        if size > free:
            without.append(name)
            continue
        place = next((number for number, left in enumerate(rest) if size <= left), None)
        if place is None:
            found.append([reference])
            rest.append(free)
            place = len(found) - 1
        found[place].append(name)
        rest[place] -= size
    if not found and free >= 0:
        found.append([reference])
    return found, (without if free >= 0 else list(needed))
