"""From a model and settings to a plan: :func:`floragrad.plan`."""

from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from floragrad.cli.plan.distributed import bucket_bytes, exchanging, sent_bytes, sharded
from floragrad.cli.plan.flora import flora_trace
from floragrad.cli.plan.models import PlannedModel, find_model, planned_model, recompute_activations
from floragrad.cli.plan.optimizers import ROWS, Row, why_not
from floragrad.cli.plan.result import (
    CATEGORIES,
    LASTING,
    MemoryPlan,
    OptimizerName,
    OptimizerPlan,
    PlanSettings,
    Progress,
    Sample,
)
from floragrad.cli.plan.trace import Trace, Tracer

FIRST_STEP = " (first step)"
"""Suffix of the moments of the first step, in which the state is allocated."""


def plan(model: Any, *, progress: Progress | None = None, **settings: Any) -> MemoryPlan:
    """Plan the memory of a model's training step with each optimizer, without allocating it.

    Forward and backward passes, clipping and the updates of other optimizers are run on fake tensors, with their real
    code, under a dispatch mode that counts allocations and frees. Flora's state, sketches and temporaries are known in
    closed form.

    Args:
        model: A preset or another name or path that ``floragrad plan`` takes, a configuration or a model of
            transformers.
        progress: Called with the row in work and the fraction of all rows that is done.
        **settings: Of :class:`floragrad.cli.plan.result.PlanSettings`: ``batch=1``, ``sequence=1024``,
            ``dtype="float32"``, ``optimizers=…``, ``rank=128``, ``ratio=None``, ``state_dtype="int8"``,
            ``accumulate=1``, ``checkpointing=False``, ``ddp=1``, ``fsdp=1``, ``defer_reduction=False``.

    Returns:
        A row for each optimizer. Bytes are counted as on a CPU: a GPU's allocator's rounding, its context and
        its libraries' workspaces come on top.

    Raises:
        ValueError: A setting has a wrong value.
        TypeError: The model is none of these, or has another head than the planned ones.
        floragrad.cli.errors.UserError: There is no such model, or it cannot be planned for.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        >>> found = plan(config, sequence=32, rank=8, optimizers=("adamw", "flora"))
        >>> found.optimizers["flora"].optimizer_state < found.optimizers["adamw"].optimizer_state / 4
        True
    """
    return plan_subject(_subject(model), PlanSettings(**settings), progress)


def plan_subject(subject: PlannedModel, settings: PlanSettings, progress: Progress | None = None) -> MemoryPlan:
    """:func:`plan` of a model that has been found already.

    Args:
        subject: The model.
        settings: The step.
        progress: As in :func:`plan`.
    """
    return Planner(subject, settings).plan(progress)


def _subject(model: Any) -> PlannedModel:
    if isinstance(model, str | PathLike):
        return find_model(fspath(model))
    config = model.config if isinstance(model, PreTrainedModel) else model
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"plan() was given a {type(model).__name__}, and takes a preset's name, a path, or a configuration or "
            "model of transformers, whose inputs it knows: for any other module, "
            "Flora(param_groups(model)).report() says the bytes of its optimizer state"
        )
    subject = planned_model(config, config.model_type)
    if config is not model and subject.built is not type(model):
        raise TypeError(
            f"plan() was given a {type(model).__name__}, and plans for the {subject.built.__name__} of its "
            "configuration: give model.config where that is meant"
        )
    return subject


class Planner:
    """Plans the rows of one model, which share its passes.

    Args:
        subject: The model.
        settings: The step.
    """

    def __init__(self, subject: PlannedModel, settings: PlanSettings) -> None:
        self.subject, self.settings = subject, settings
        self._tracers: dict[bool, tuple[nn.Module, Tracer]] = {}

    def plan(self, progress: Progress | None = None) -> MemoryPlan:
        """Plan all rows; see :func:`plan_subject`."""
        settings = self.settings
        rows: dict[OptimizerName, OptimizerPlan] = {}
        unavailable: dict[OptimizerName, str] = {}
        for index, name in enumerate(settings.optimizers):
            if progress is not None:
                progress(name, index / len(settings.optimizers))
            reason = why_not(name, settings)
            if reason is None:
                rows[name] = self.row(ROWS[name])
            else:
                unavailable[name] = reason
        if progress is not None:
            progress("done", 1.0)
        return MemoryPlan(self.subject.name, settings, rows, unavailable)

    def row(self, row: Row, accumulate: int | None = None) -> OptimizerPlan:
        """Plan one row, whose packages are there.

        Args:
            row: The row.
            accumulate: Micro-batches of a step, on which no pass depends; None: of the settings.
        """
        settings = self.settings
        accumulate = settings.accumulate if accumulate is None else accumulate
        model, tracer = self._traced(row)
        if row.peer is None:
            trace = flora_trace(tracer, row.flora(model, settings), accumulate, row.clip)
        else:
            trace = tracer.peer_trace(partial(row.optimizer, settings=settings), accumulate)
        sent = sent_bytes(model, trace.kept[2], settings, accumulate)
        if trace.kept[2] and (settings.ddp > 1 or settings.defer_reduction):
            trace = exchanging(trace)
        if settings.fsdp > 1:
            options = {"deferred": settings.defer_reduction, "releases": row.clip is False}
            trace = sharded(trace, model, settings.fsdp, **options)
        if settings.ddp > 1 and row.clip is None:
            buckets = bucket_bytes(model)
            first, steady = (
                tuple(moment.plus(buckets=buckets) for moment in each) for each in (trace.first, trace.steady)
            )
            trace = replace(trace, first=first, steady=steady)
        return replace(row_of(trace), sent=sent)

    def _traced(self, row: Row) -> tuple[nn.Module, Tracer]:
        """Return the model that a row trains, on the meta device, and its tracer."""
        if row.lora not in self._tracers:
            settings = self.settings
            dtype: torch.dtype = getattr(torch, settings.dtype)
            with torch.device("meta"):
                model = row.adapted(self.subject.build(dtype), settings)
            if settings.checkpointing:
                recompute_activations(model)
            inputs = partial(self.subject.inputs, settings.batch, settings.sequence, dtype)
            self._tracers[row.lora] = model, Tracer(model, inputs)
        return self._tracers[row.lora]


def row_of(trace: Trace) -> OptimizerPlan:
    """Return a trace as a row: the highest sample of all, and the most of each category."""
    first = [replace(moment, name=moment.name + FIRST_STEP) for moment in trace.first]
    later = trace.steady
    # Of equal peaks the one of a later step is named, which comes again.
    peak = max((*later, *first), key=lambda moment: sum(moment.peak))
    # Not of the first step too: there the state is still among the temporaries of the update that allocates it.
    most = {name: max(moment.highest[at] for moment in later) for at, name in enumerate(CATEGORIES)}
    kept = dict(zip(LASTING, trace.kept, strict=True))
    return OptimizerPlan(
        parameters=kept["parameters"],
        optimizer_state=kept["optimizer_state"],
        accumulation=kept["accumulation"],
        gradients=most["gradients"],
        buckets=most["buckets"],
        activations=most["activations"],
        temporaries=most["temporaries"],
        peak=sum(peak.peak),
        peak_moment=peak.name,
        at_peak=dict(zip(CATEGORIES, peak.peak, strict=True)),
        timeline=tuple(Sample(moment.name, moment.peak) for moment in later),
    )
