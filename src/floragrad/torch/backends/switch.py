"""The environment variable that turns kernels off."""

import os
from typing import Final

SWITCH: Final = "FLORAGRAD_KERNELS"
_FORMER: Final = "FLORAGRAD_NATIVE"


def kernels_allowed() -> bool:
    """Return whether kernels may be used: ``FLORAGRAD_KERNELS`` is ``auto``, the default, or ``eager``.

    Raises:
        ValueError: It has another value, or the variable of version 0.1 is set.
    """
    if _FORMER in os.environ:
        raise ValueError(f"{_FORMER}={os.environ[_FORMER]} is no longer supported: set {SWITCH}=eager or {SWITCH}=auto")
    switch = os.environ.get(SWITCH, "auto")
    if switch not in ("auto", "eager"):
        raise ValueError(f"{SWITCH}={switch}: auto runs kernels where there are any, eager runs PyTorch's operations")
    return switch == "auto"
