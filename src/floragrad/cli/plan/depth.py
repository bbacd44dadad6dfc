"""From a model of three blocks and one of four to one of any number: memory is linear in the number of blocks.

Blocks are alike, so at any moment the live bytes are a + b·N + c·j, with N the number of blocks and j how many of
them the pass has behind it; the first and the last block, whose neighbours differ, have an a and b of their own.
Two traces give every coefficient, in whole bytes, and a deeper model's trace follows without an error. Names tell
the blocks: a parameter or module of block j has ``.j.`` in its name.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Final

from floragrad.cli.plan.trace import Trace
from floragrad.cli.plan.tracker import Moment

SHALLOW: Final = 3
"""Blocks of the first trace: a first, a last, and one between; the second has one more."""

_BLOCK = re.compile(r"^(?P<stem>.*?\.)(?P<index>\d+)(?=\.|$)")


class DepthError(Exception):
    """Two traces do not fit each other: the blocks are not alike."""


def deepened(shallow: Trace, deeper: Trace, blocks: int) -> Trace:
    """Return the trace of a model with more blocks.

    Args:
        shallow: Of the model with :data:`SHALLOW` blocks.
        deeper: Of the model with one block more.
        blocks: How many there are; more than both have.

    Raises:
        DepthError: The blocks are not alike.
    """
    more = blocks - SHALLOW
    return Trace(
        _moments(shallow.first, deeper.first, more),
        tuple(
            _moments(three, four, more) for three, four in zip(shallow.micro_batches, deeper.micro_batches, strict=True)
        ),
        _moments(shallow.update, deeper.update, more),
        _ahead(shallow.kept, deeper.kept, more),
    )


def _moments(three: Sequence[Moment], four: Sequence[Moment], more: int) -> tuple[Moment, ...]:
    """Return a section of a step: moments outside the blocks, and visits to all blocks in turn."""
    runs = [(stem, list(run)) for stem, run in groupby(three, key=_stem)]
    deep = [(stem, list(run)) for stem, run in groupby(four, key=_stem)]
    if [stem for stem, _ in runs] != [stem for stem, _ in deep]:
        raise DepthError("moments of other modules")
    moments: list[Moment] = []
    for (stem, run), (_, deep_run) in zip(runs, deep, strict=True):
        if stem is None:
            moments += (_moment(a, b, more) for a, b in _pairs(run, deep_run))
        else:
            visits, deep_visits = _visits(run), _visits(deep_run)
            if len(visits) != len(deep_visits):
                raise DepthError(f"{len(visits)} and {len(deep_visits)} visits")
            for visit, deep_visit in zip(visits, deep_visits, strict=True):
                moments += _visit(visit, deep_visit, more)
    return tuple(moments)


def _visit(three: list[list[Moment]], four: list[list[Moment]], more: int) -> list[Moment]:
    """Return a pass through all blocks, upwards or downwards."""
    if len(three) == len(four) == 1 and _index(three[0][0].name) == _index(four[0][0].name) == 0:
        # What only the first block has is like what is outside the blocks.
        return [_moment(a, b, more) for a, b in _pairs(three[0], four[0])]
    if len(three) != SHALLOW or len(four) != SHALLOW + 1:
        raise DepthError(f"{len(three)} and {len(four)} blocks are visited")
    blocks = SHALLOW + more
    is_upwards = _index(three[0][0].name) == 0
    visited = [[_moment(a, b, more) for a, b in _pairs(three[0], four[0])]]
    between = _pairs(three[1], four[1])
    steps = [(b.peak, c.peak, b.highest, c.highest) for b, c in _pairs(four[1], four[2])]
    for j in range(blocks - 2):
        group = []
        for (a, b), (here, further, highest_here, highest_further) in zip(between, steps, strict=True):
            start = _moment(a, b, more)
            peak = _sum(start.peak, _scaled(_sum(further, _scaled(here, -1)), j))
            highest = _sum(start.highest, _scaled(_sum(highest_further, _scaled(highest_here, -1)), j))
            group.append(Moment(start.name, peak, highest))
        visited.append(group)
    visited.append([_moment(a, b, more) for a, b in _pairs(three[2], four[3])])
    order = range(blocks) if is_upwards else range(blocks - 1, -1, -1)
    return [
        Moment(_renamed(moment.name, index), moment.peak, moment.highest)
        for index, group in zip(order, visited, strict=True)
        for moment in group
    ]


def _moment(a: Moment, b: Moment, more: int) -> Moment:
    return Moment(a.name, _ahead(a.peak, b.peak, more), _ahead(a.highest, b.highest, more))


def _pairs(left: list[Moment], right: list[Moment]) -> list[tuple[Moment, Moment]]:
    if [_renamed(each.name, 0) for each in left] != [_renamed(each.name, 0) for each in right]:
        raise DepthError("moments of other names")
    return list(zip(left, right, strict=True))


def _visits(run: list[Moment]) -> list[list[list[Moment]]]:
    """Return the moments of each block in turn, anew whenever the first block comes again."""
    visits: list[list[list[Moment]]] = []
    for index, group in groupby(run, key=lambda moment: _index(moment.name)):
        if index == _index(run[0].name):
            visits.append([])
        visits[-1].append(list(group))
    return visits


def _stem(moment: Moment) -> str | None:
    """Return the module list of a moment's block, without the pass; None outside the blocks."""
    found = _BLOCK.match(moment.name)
    return None if found is None else found["stem"].rpartition(" ")[2]


def _index(name: str) -> int:
    found = _BLOCK.match(name)
    assert found is not None
    return int(found["index"])


def _renamed(name: str, index: int) -> str:
    return _BLOCK.sub(lambda found: f"{found['stem']}{index}", name)


def _ahead(at_three: Sequence[int], at_four: Sequence[int], more: int) -> tuple[int, ...]:
    return tuple(a + (b - a) * more for a, b in zip(at_three, at_four, strict=True))


def _sum(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _scaled(values: Sequence[int], factor: int) -> tuple[int, ...]:
    return tuple(value * factor for value in values)
