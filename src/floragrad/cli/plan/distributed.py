"""Differences that training on several devices makes to a step, on each of them."""

from collections.abc import Iterable
from math import ceil

from torch import Tensor, nn

from floragrad.cli.plan.result import CATEGORIES, LASTING
from floragrad.cli.plan.trace import Trace
from floragrad.cli.plan.tracker import Moment


def sharded(trace: Trace, model: nn.Module, devices: int) -> Trace:
    """Return a step under FSDP2 (``fully_shard`` of every block, then of the model), on the device that holds most.

    This is arithmetic on the step of one device, not a step of its own. Every tensor is cut along its first
    dimension; parameters, gradients, state and the temporaries of an update are scaled by the largest shard's part.
    Activations stay. Counted as buckets are weights that are gathered (those outside the blocks from forward to
    backward pass, the block at work, the next one) and in a backward pass two blocks of gradients: those that are
    made, and those that are being reduced.

    Args:
        trace: Of one device.
        model: Of shapes alone.
        devices: How many share it.

    Source: Zhao et al., "PyTorch FSDP: experiences on scaling fully sharded data parallel", VLDB 2023; what stays
    gathered is ``fully_shard``'s default.
    """
    whole, part = nbytes(model.parameters()), sum(_shard(param, devices) for param in model.parameters())
    blocks = [nbytes(block.parameters()) for each in _outermost(model) for block in each]
    block = max(blocks, default=0)
    outside = max(0, whole - sum(blocks))

    def on_one(moment: Moment) -> Moment:
        in_flight = 0
        if moment.name.startswith("forward"):
            in_flight = outside + 2 * block
        elif moment.name.startswith(("backward", "fold")):
            in_flight = outside + 4 * block
        return Moment(moment.name, scaled(moment.peak, in_flight), scaled(moment.highest, in_flight))

    def scaled(values: tuple[int, ...], in_flight: int) -> tuple[int, ...]:
        found = dict(zip(CATEGORIES, values, strict=True))
        for category in ("parameters", "optimizer_state", "gradients", "temporaries"):
            found[category] = ceil(found[category] * part / whole)
        found["buckets"] = in_flight
        return tuple(found.values())

    kept = tuple(ceil(value * part / whole) for value in trace.kept)
    assert len(kept) == len(LASTING)
    return Trace(tuple(map(on_one, trace.first)), tuple(map(on_one, trace.steady)), kept)


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
