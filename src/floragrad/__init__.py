"""Flora: optimizer state compressed by random projections, for large models on small devices.

Importing this package loads no framework. The PyTorch names below are imported at their first use:

    >>> from floragrad import Flora, param_groups
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from floragrad._version import __version__

if TYPE_CHECKING:
    from floragrad.cli.plan.engine import plan
    from floragrad.torch import Flora, FloraHookState, GradientAccumulator, flora_hook, param_groups

_TORCH = ("Flora", "FloraHookState", "GradientAccumulator", "flora_hook", "param_groups")

__all__ = ["Flora", "FloraHookState", "GradientAccumulator", "__version__", "flora_hook", "param_groups", "plan"]

_HOME = dict.fromkeys(_TORCH, "floragrad.torch")
_HOME["plan"] = "floragrad.cli.plan.engine"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'floragrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
