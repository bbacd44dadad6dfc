"""Measurement of planned steps on this machine's CPU: ``floragrad plan --measure``."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from floragrad._extras import require
from floragrad._text import format_bytes
from floragrad.cli.errors import UserError
from floragrad.cli.plan.engine import plan_subject, row_of
from floragrad.cli.plan.result import MemoryPlan, OptimizerName, OptimizerPlan, PlanSettings, Progress
from floragrad.cli.plan.subject import Subject
from floragrad.cli.plan.trace import DISTINCT_MICRO_BATCHES, run
from floragrad.cli.plan.tracker import Profiles

MOST_TOKENS: Final = 128
"""Tokens of a sequence that is run for real: time grows with them, and the check does not."""
SHARE: Final = 0.5
"""Fraction of the free memory that a step may take."""


@dataclass(frozen=True)
class Measurement:
    """A step that was run for real, and its prediction.

    Attributes:
        predicted: The plan at the size that was run.
        measured: Its rows, by the same tracker on real tensors.
        blocks: How many of the model's blocks were built.
    """

    predicted: MemoryPlan
    measured: Mapping[OptimizerName, OptimizerPlan]
    blocks: int


@dataclass(frozen=True)
class _Shallow:
    """A subject with fewer blocks."""

    whole: Subject
    blocks: int

    @property
    def name(self) -> str:
        return self.whole.name

    def build(self, dtype: torch.dtype, blocks: int) -> nn.Module:
        return self.whole.build(dtype, blocks)

    def inputs(self, batch: int, sequence: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return self.whole.inputs(batch, sequence, dtype)


def measure(
    subject: Subject, settings: PlanSettings, progress: Progress | None = None, budget: int | None = None
) -> Measurement:
    """Run the step of every row for real, and predict it at the same size.

    The size fits: one sequence of at most 128 tokens, three micro-batches, and as many of the model's blocks
    as leave half of the free memory free. It runs in one process, without DDP and FSDP.

    Args:
        subject: The model.
        settings: The settings.
        progress: Called with the row in work and the fraction that is done.
        budget: Bytes that a step may take; None: half of the memory that is free.

    Raises:
        floragrad.cli.errors.UserError: Not even one block fits.
    """
    free = int(SHARE * require("psutil", "plan").virtual_memory().available) if budget is None else budget
    settings = replace(
        settings,
        batch=1,
        sequence=min(settings.sequence, MOST_TOKENS),
        accumulate=min(settings.accumulate, DISTINCT_MICRO_BATCHES),
        ddp=1,
        fsdp=1,
    )
    profiles: Profiles = {}
    blocks = subject.blocks
    planned = plan_subject(subject, settings, None, profiles)
    while (needed := _highest(planned)) > free:
        if blocks == 1:
            raise UserError(
                f"--measure needs {format_bytes(needed)} for the least of MODEL {subject.name}, and "
                f"{format_bytes(free)} may be taken here: measure a smaller model"
            )
        blocks //= 2
        planned = plan_subject(_Shallow(subject, blocks), settings, None, profiles)
    measured = {}
    for index, name in enumerate(planned.optimizers):
        if progress is not None:
            progress(f"{name}, for real", index / len(planned.optimizers))
        torch.manual_seed(0)
        measured[name] = row_of(run(_Shallow(subject, blocks), name, settings), settings)
    if progress is not None:
        progress("done", 1.0)
    return Measurement(planned, measured, blocks)


def _highest(planned: MemoryPlan) -> int:
    return max((row.peak for row in planned.optimizers.values()), default=0)
