"""Gradient accumulation that never holds a gradient."""

from floragrad.torch.accumulation.accumulator import GradientAccumulator
from floragrad.torch.accumulation.report import AccumulatorReport, AccumulatorRow

__all__ = ["AccumulatorReport", "AccumulatorRow", "GradientAccumulator"]
