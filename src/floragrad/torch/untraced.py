"""The decorator of functions that ``torch.compile`` does not trace: the graph breaks, as at torch's own optimizers."""

from torch._compile import _disable_dynamo as untraced  # unlike torch.compiler.disable it does not load dynamo

__all__ = ["untraced"]
