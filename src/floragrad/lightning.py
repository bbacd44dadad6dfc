"""Flora in Lightning: the callback ``FloraAccumulation``."""

from floragrad.torch.integrations.lightning import FloraAccumulation

__all__ = ["FloraAccumulation"]
