"""Flora in Accelerate: ``FloraAccelerator``."""

from floragrad.torch.integrations.accelerate import FloraAccelerator

__all__ = ["FloraAccelerator"]
