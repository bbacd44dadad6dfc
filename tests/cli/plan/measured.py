"""A training step on real tensors, its bytes counted by the tracker: what a plan must predict."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from floragrad import GradientAccumulator
from floragrad.cli.peers import state_tensors
from floragrad.cli.plan.models import PlannedModel, recompute_activations
from floragrad.cli.plan.optimizers import ROWS
from floragrad.cli.plan.result import CATEGORIES, OptimizerName, PlanSettings
from floragrad.cli.plan.tracker import MemoryTracker

STEPS = 2
"""State is allocated in the first step."""


@dataclass(frozen=True)
class Measured:
    """Bytes of a step that was run."""

    parameters: int
    optimizer_state: int
    accumulation: int
    gradients: int
    peak: int


def measure(subject: PlannedModel, name: OptimizerName, settings: PlanSettings) -> Measured:
    """Train for two steps."""
    row = ROWS[name]
    row.load()
    dtype = getattr(torch, settings.dtype)
    model = row.adapted(subject.build(dtype), settings)
    if settings.checkpointing:
        recompute_activations(model)
    tracker = MemoryTracker()
    for tensor in (*model.parameters(), *model.buffers()):
        tracker.hold(tensor, "parameters")
    trained = [param for param in model.parameters() if param.requires_grad]
    with tracker, ExitStack() as stack:
        optimizer: Any = row.flora(model, settings, kappa=1) if row.peer is None else row.optimizer(model, settings)
        for param in trained:
            param.register_post_accumulate_grad_hook(lambda param: tracker.hold(param.grad, "gradients"))
        accumulator = None
        if row.clip is not None:
            with tracker.during("sketches", "accumulation"):
                accumulator = GradientAccumulator(optimizer, settings.accumulate, clip=row.clip)
            stack.callback(accumulator.close)
        for _ in range(STEPS):
            for _ in range(settings.accumulate):
                batch = subject.inputs(settings.batch, settings.sequence, dtype)
                loss = model(**batch).loss
                accumulator.backward(loss) if accumulator else (loss / settings.accumulate).backward()
                del batch, loss
            if accumulator is None:
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            else:
                if row.clip:
                    accumulator.clip_grad_norm_(1.0)
                accumulator.step()
            for tensor in state_tensors(optimizer):
                tracker.hold(tensor, "optimizer_state")
        gradients = max(moment.highest[CATEGORIES.index("gradients")] for moment in tracker.cut())
        kept = [tracker.bytes_of(name) for name in ("parameters", "optimizer_state", "accumulation")]
    return Measured(*kept, gradients, tracker.peak)
