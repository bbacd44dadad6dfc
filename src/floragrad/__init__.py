"""Flora: optimizer state kept as random projections, for large models on small devices.

Importing this package loads no framework. The PyTorch names below are imported when they are first used:

    >>> from floragrad import Flora, param_groups
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from floragrad._version import __version__

if TYPE_CHECKING:
    from floragrad.torch import Flora, GradientAccumulator, param_groups

__all__ = ["Flora", "GradientAccumulator", "__version__", "param_groups"]

_TORCH_NAMES = ("Flora", "GradientAccumulator", "param_groups")


def __getattr__(name: str) -> Any:
    if name in _TORCH_NAMES:
        return getattr(import_module("floragrad.torch"), name)
    raise AttributeError(f"module 'floragrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
