"""From a model and settings to a plan: :func:`floragrad.plan`."""

from collections.abc import Iterator
from dataclasses import replace
from os import PathLike, fspath
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from floragrad.cli.plan.closed_form import closed_form
from floragrad.cli.plan.depth import SHALLOW, DepthError, deepened
from floragrad.cli.plan.distributed import sharded
from floragrad.cli.plan.models import find_model, planned_model
from floragrad.cli.plan.optimizers import why_not
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
from floragrad.cli.plan.subject import Subject
from floragrad.cli.plan.trace import Trace, meta_model, predict
from floragrad.cli.plan.tracker import Moment, Profiles

FIRST_STEP = " (first step)"
"""Suffix of the moments of the first step, in which the state is allocated."""


def plan(model: Any, *, progress: Progress | None = None, **settings: Any) -> MemoryPlan:
    """Plan the memory of a model's training step with each optimizer, without allocating it.

    The whole step (forward and backward passes of all micro-batches, clipping, update) is run on fake tensors, with
    the real model, optimizer and accumulator code, under a dispatch mode that counts allocations and frees.

    Args:
        model: A preset or another name or path that ``floragrad plan`` takes, a configuration or a model of
            transformers.
        progress: Called with the row in work and the fraction of all rows that is done.
        **settings: Of :class:`floragrad.cli.plan.result.PlanSettings`: ``batch=1``, ``sequence=1024``,
            ``dtype="float32"``, ``optimizers=…``, ``rank=128``, ``ratio=None``, ``state_dtype="int8"``,
            ``accumulate=1``, ``checkpointing=False``, ``ddp=1``, ``fsdp=1``.

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


def plan_subject(
    subject: Subject, settings: PlanSettings, progress: Progress | None = None, profiles: Profiles | None = None
) -> MemoryPlan:
    """:func:`plan` of a model that has been found already.

    Args:
        subject: The model.
        settings: The step.
        progress: As in :func:`plan`.
        profiles: Bytes of the work on single tensors, from earlier plans of the same model.
    """
    rows: dict[OptimizerName, OptimizerPlan] = {}
    unavailable: dict[OptimizerName, str] = {}
    profiles = {} if profiles is None else profiles
    for index, name in enumerate(settings.optimizers):
        if progress is not None:
            progress(name, index / len(settings.optimizers))
        reason = why_not(name, settings)
        if reason is None:
            rows[name] = row_of(_predicted(subject, name, settings, profiles), settings)
        else:
            unavailable[name] = reason
    if progress is not None:
        progress("done", 1.0)
    return MemoryPlan(subject.name, settings, rows, unavailable)


def _subject(model: Any) -> Subject:
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


def _predicted(subject: Subject, name: OptimizerName, settings: PlanSettings, profiles: Profiles) -> Trace:
    """Return the trace of the whole model on one device."""
    trace = _traced(subject, name, settings, profiles)
    if settings.fsdp == 1:
        return trace
    return sharded(trace, meta_model(subject, name, settings, subject.blocks), settings.fsdp)


def _traced(subject: Subject, name: OptimizerName, settings: PlanSettings, profiles: Profiles) -> Trace:
    """Return the trace of the whole model; of a deep one, from those of shallow ones."""
    if subject.blocks > SHALLOW + 1:
        traces = [predict(subject, name, settings, count, profiles) for count in (SHALLOW, SHALLOW + 1)]
        whole = meta_model(subject, name, settings, subject.blocks)
        try:
            deep = deepened(traces[0], traces[1], subject.blocks)
        except DepthError:
            deep = None
        # Blocks that are not alike after all are traced one by one.
        if deep is not None and deep.kept == closed_form(whole, name, settings).kept:
            return deep
    return predict(subject, name, settings, subject.blocks, profiles)


def row_of(trace: Trace, settings: PlanSettings) -> OptimizerPlan:
    """Return a trace as a row: the highest sample of all, and the most of each category."""
    first = [replace(moment, name=moment.name + FIRST_STEP) for moment in trace.first]
    later = list(_in_order(trace, settings.accumulate))
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


def _in_order(trace: Trace, accumulate: int) -> Iterator[Moment]:
    """Yield a step in the steady state, the micro-batches that were traced once for many as often as they are there."""
    last = len(trace.micro_batches) - 1
    for index, moments in enumerate(trace.micro_batches):
        for _ in range(accumulate - last if 0 < index < last else 1):
            yield from moments
    yield from trace.update
