"""Graph breaks of ``torch.compile`` at the optimizer, as at torch's own optimizers."""

import sys

from torch._compile import _disable_dynamo as disable_dynamo  # unlike torch.compiler.disable it does not import dynamo

__all__ = ["caller_stacklevel", "disable_dynamo"]


def caller_stacklevel() -> int:
    """Return the ``stacklevel`` that makes a warning point at the caller of a decorated method.

    The number of torch's decorators, hooks and schedulers in between varies.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "floragrad"):
        frame, level = frame.f_back, level + 1
    return level
