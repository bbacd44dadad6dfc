"""One training step, with the real model, optimizer and accumulator, on tensors that need not be real.

On fake tensors it is the prediction, on real ones the measurement: the same function runs both.
"""

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from floragrad._extras import require
from floragrad.cli.plan.optimizers import ROWS
from floragrad.cli.plan.repeats import decoded_gradients, repeated_work, replaced
from floragrad.cli.plan.result import LASTING, OptimizerName, PlanSettings
from floragrad.cli.plan.step import TrainingStep, hold_sketches, hold_state
from floragrad.cli.plan.subject import Subject
from floragrad.cli.plan.tracker import MemoryTracker, Moment, Profiles

masking_utils = require("transformers.masking_utils", "plan")

DISTINCT_MICRO_BATCHES: Final = 3
"""The first, any in between and the last: those in between hold the same."""


@dataclass(frozen=True)
class Trace:
    """Live bytes during a training step.

    Attributes:
        first: The moments of the first step, of one micro-batch; empty where the optimizer's state is allocated
            before it, so that it is like any other.
        micro_batches: Those of a later step's micro-batches, where predicted of at most three of them.
        update: Those of its clipping and update.
        kept: Bytes between steps, of each category of :data:`floragrad.cli.plan.result.LASTING`.
    """

    first: tuple[Moment, ...]
    micro_batches: tuple[tuple[Moment, ...], ...]
    update: tuple[Moment, ...]
    kept: tuple[int, ...]


def predict(subject: Subject, name: OptimizerName, settings: PlanSettings, blocks: int, profiles: Profiles) -> Trace:
    """Trace a step on fake tensors: nothing is allocated, nothing computed.

    Args:
        subject: The model.
        name: The row.
        settings: The step.
        blocks: How many of the model's blocks to build.
        profiles: Bytes of the work on single tensors, from other traces too.
    """
    model = meta_model(subject, name, settings, blocks)
    # Of fake positions it cannot tell that they are of one text, and would have a mask drawn up for several.
    one_text = replaced(masking_utils, "find_packed_sequence_indices", lambda _: None)
    tracker = MemoryTracker()
    with FakeTensorMode(), one_text, repeated_work(tracker, profiles):
        _materialise(model)
        return _traced(model, subject, name, settings, min(settings.accumulate, DISTINCT_MICRO_BATCHES), tracker)


def meta_model(subject: Subject, name: OptimizerName, settings: PlanSettings, blocks: int) -> nn.Module:
    """Return the model that a row trains, of shapes alone."""
    ROWS[name].load()
    with torch.device("meta"):
        return ROWS[name].adapted(subject.build(_dtype(settings), blocks), settings)


def run(subject: Subject, name: OptimizerName, settings: PlanSettings) -> Trace:
    """Trace a step for real, on the CPU."""
    ROWS[name].load()
    model = ROWS[name].adapted(subject.build(_dtype(settings), subject.blocks), settings)
    return _traced(model, subject, name, settings, settings.accumulate, MemoryTracker())


def _dtype(settings: PlanSettings) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


def bucket_bytes(model: nn.Module) -> int:
    """Bytes of the buckets that DistributedDataParallel keeps: a copy of every gradient, in its dtype.

    They are flat buffers that gradients are copied into before they are averaged (``gradient_as_bucket_view=False``,
    the default of torch and of Hugging Face's Accelerate), and they stay from step to step.
    """
    return sum(param.numel() * param.element_size() for param in model.parameters() if param.requires_grad)


def _materialise(model: nn.Module) -> None:
    """Give a model of the meta device tensors of the current mode on the CPU, tied ones once."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                if old not in made:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cpu")
                    is_parameter = isinstance(old, nn.Parameter)
                    made[old] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                table[name] = made[old]  # type: ignore[assignment]


def _traced(
    model: nn.Module,
    subject: Subject,
    name: OptimizerName,
    settings: PlanSettings,
    count: int,
    tracker: MemoryTracker,
) -> Trace:
    if settings.checkpointing:
        with warnings.catch_warnings():
            # Newer versions of transformers have another name for it, older ones only this.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    for name_of, tensor in (*model.named_parameters(), *model.named_buffers()):
        tracker.hold(tensor, "parameters", name_of)
    if settings.ddp > 1:
        tracker.add("buckets", bucket_bytes(model))
    row = ROWS[name]
    with tracker, decoded_gradients(tracker), ExitStack() as hooks:
        step = TrainingStep(
            model, partial(subject.inputs, settings.batch, settings.sequence, _dtype(settings)), tracker
        )
        optimizer = row.optimizer(model, settings)
        is_steady = hold_state(tracker, optimizer)
        hooks.enter_context(step.module_moments())
        with step.gradient_moments(row.clip):
            accumulator = row.accumulator(optimizer, count)
        if accumulator is not None:
            hooks.callback(accumulator.close)
            hold_sketches(tracker, accumulator)
        first: tuple[Moment, ...] = ()
        step.rest()
        tracker.cut()
        if not is_steady:
            step.micro_batch(1, None)
            step.update(optimizer, None)
            hold_state(tracker, optimizer)
            first = tracker.cut()
        micro_batches = []
        for index in range(count):
            step.micro_batch(count, accumulator, is_last=index == count - 1)
            micro_batches.append(tracker.cut())
        step.update(optimizer, accumulator)
        hold_state(tracker, optimizer)
        update = tracker.cut()
        kept = tuple(tracker.bytes_of(category) for category in LASTING)
    return Trace(first, tuple(micro_batches), update, kept)
