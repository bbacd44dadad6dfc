"""A smaller model for files with many runs. It imports no library, so that a process of tests may do it first."""

from dataclasses import replace

from floragrad.cli.presets import PRESETS

ONE_LAYER = {"tiny": replace(PRESETS["tiny"], layers=1)}
"""What takes the place of the preset with three; see the fixture ``one_layer``."""
