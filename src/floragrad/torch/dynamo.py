"""The decorator of functions that ``torch.compile`` does not trace: the graph breaks, as at torch's own optimizers."""

import sys

from torch._compile import _disable_dynamo as disable_dynamo  # unlike torch.compiler.disable it does not load dynamo

__all__ = ["caller_stacklevel", "disable_dynamo"]


def caller_stacklevel() -> int:
    """Return the ``stacklevel`` that makes a warning point at the caller of an disable_dynamo method.

    Decorators, hooks and schedulers of torch lie between, in numbers that differ.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "floragrad"):
        frame, level = frame.f_back, level + 1
    return level
