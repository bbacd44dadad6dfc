"""Sizes as people write them."""

import re
from typing import Final, NamedTuple

from floragrad._text import format_bytes

UNITS: Final = {
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
_UNITS_BY_NAME: Final = {name.lower(): unit for unit in UNITS for name in (unit, unit.removesuffix("B"))}


class Size(NamedTuple):
    """A number of bytes, and how to say it: in powers of 1000 as all sizes are, with the given words beside it."""

    nbytes: int
    words: str


def parse_size(text: str) -> Size:
    """Read a size.

    Args:
        text: A number and a unit: kB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB are powers of 1024. The B
            may be left out, and case makes no difference: ``24g`` is 24 GB.

    Raises:
        ValueError: It is no size, or is none at all.

    Example:
        >>> parse_size("24GB"), parse_size("1.5 gib")
        (Size(nbytes=24000000000, words='24 GB'), Size(nbytes=1610612736, words='1.6 GB (1.5 GiB)'))
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, flags=re.IGNORECASE)
    unit = _UNITS_BY_NAME.get(found[2].lower()) if found else None
    if found is None or unit is None or float(found[1]) == 0:
        raise ValueError(f"{text!r} is no size: give a number above 0 and one of {', '.join(UNITS)}, like 24GB")
    nbytes, given = round(float(found[1]) * UNITS[unit]), f"{found[1]} {unit}"
    return Size(nbytes, f"{format_bytes(nbytes)} ({given})" if "i" in unit else given)
