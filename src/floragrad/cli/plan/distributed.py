"""Differences that training on several devices makes to a step, on each of them."""

from collections.abc import Iterable
from dataclasses import replace
from math import ceil

from torch import Tensor, nn

from floragrad.cli.plan.result import CATEGORIES, LASTING, PlanSettings
from floragrad.cli.plan.trace import Trace
from floragrad.cli.plan.tracker import Moment
from floragrad.torch.distributed.collectives import BUCKET_BYTES


def sharded(trace: Trace, model: nn.Module, devices: int, *, deferred: bool = False, releases: bool = False) -> Trace:
    """Return a step under FSDP2 (``fully_shard`` of every block, then of the model), on the device that holds most.

    This is arithmetic on the step of one device, not a step of its own. Every tensor is cut along its first
    dimension; parameters, gradients, sketches, state and the temporaries of an update are scaled by the largest shard's
    part. Activations stay. Where the reduction is deferred, gradients and the temporaries of their folds are whole
    until the update, and sketches of whole tensors are kept beside those of the shards.

    Counted as buckets are weights that are gathered (those outside the blocks from forward to backward pass, the block
    at work, the next one) and in a backward pass two blocks of gradients: those that are made, and those that are being
    reduced, if they are.

    Args:
        trace: Of one device.
        model: Of shapes alone.
        devices: How many share it.
        deferred: Reduce once in a step.
        releases: Tensors are updated inside the backward pass.

    Source: Zhao et al., "PyTorch FSDP: experiences on scaling fully sharded data parallel", VLDB 2023; what stays
    gathered is ``fully_shard``'s default.
    """
    whole, part = nbytes(model.parameters()), sum(_shard(param, devices) for param in model.parameters())
    blocks = [nbytes(block.parameters()) for each in _outermost(model) for block in each]
    block = max(blocks, default=0)
    outside = max(0, whole - sum(blocks))
    backward = ("backward", "fold", *(("update of",) if releases else ()))

    def on_one(moment: Moment) -> Moment:
        in_flight, is_whole = 0, False
        if moment.name.startswith("forward"):
            in_flight, is_whole = outside + 2 * block, deferred
        elif moment.name.startswith(backward):
            in_flight, is_whole = outside + (2 if deferred else 4) * block, deferred
        return Moment(
            moment.name, scaled(moment.peak, in_flight, is_whole), scaled(moment.highest, in_flight, is_whole)
        )

    def scaled(values: tuple[int, ...], in_flight: int, is_whole: bool) -> tuple[int, ...]:
        found = dict(zip(CATEGORIES, values, strict=True))
        for category in ("parameters", "optimizer_state", *(() if is_whole else ("gradients", "temporaries"))):
            found[category] = ceil(found[category] * part / whole)
        found["accumulation"] = sketches(found["accumulation"])
        found["buckets"] += in_flight
        return tuple(found.values())

    def sketches(nbytes: int) -> int:
        return ceil(nbytes * part / whole) + (nbytes if deferred else 0)

    parameters, state, accumulation = trace.kept
    kept = (ceil(parameters * part / whole), ceil(state * part / whole), sketches(accumulation))
    assert len(kept) == len(LASTING)
    return Trace(tuple(map(on_one, trace.first)), tuple(map(on_one, trace.steady)), kept)


def exchanging(trace: Trace) -> Trace:
    """Return a step whose sketches are exchanged before they are clipped: four messages exist at a time."""
    messages = 4 * min(BUCKET_BYTES, trace.kept[LASTING.index("accumulation")])
    steady = (each.plus(buckets=messages) if each.name == "clipping" else each for each in trace.steady)
    return replace(trace, steady=tuple(steady))


def sent_bytes(model: nn.Module, sketches: int, settings: PlanSettings, accumulate: int) -> int:
    """Return the bytes of gradients that a device sends in a step.

    DistributedDataParallel averages once in a step (``no_sync``), FSDP2 in every micro-batch or once.

    Args:
        model: Of shapes alone.
        sketches: Bytes of the sketches that are sent instead of gradients; 0 without.
        settings: Of the plan.
        accumulate: Micro-batches of a step.
    """
    whole, devices = bucket_bytes(model), max(settings.ddp, settings.fsdp)
    if settings.ddp > 1:
        whole = 2 * (sketches or whole)
    elif settings.defer_reduction:
        whole = sketches or whole
    else:
        whole *= accumulate
    return ceil(whole * (devices - 1) / devices)


def bucket_bytes(model: nn.Module) -> int:
    """Bytes of the buckets that DistributedDataParallel keeps: a copy of every gradient, in its dtype.

    They are flat buffers that gradients are copied into before they are averaged (``gradient_as_bucket_view=False``,
    the default of torch and of Hugging Face's Accelerate), and they stay from step to step.
    """
    return nbytes(param for param in model.parameters() if param.requires_grad)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each of its own size."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _shard(param: Tensor, devices: int) -> int:
    """Bytes of the first device's rows, which has one more where they do not come out even."""
    rows = param.shape[0] if param.dim() else 1
    return ceil(rows / devices) * (param.numel() // max(rows, 1)) * param.element_size()


def _outermost(module: nn.Module) -> Iterable[nn.ModuleList]:
    """Return the lists of a model's blocks, not the lists inside of blocks."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost(child)
