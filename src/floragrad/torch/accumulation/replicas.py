"""Checks that processes do the same: shards of one window, and the weights of replicas."""

import struct
from collections.abc import Iterable, Sequence
from typing import Final
from zlib import crc32

import torch
from torch import Tensor

from floragrad.torch.accumulation.settings import Settings
from floragrad.torch.accumulation.window import ParamEntry, Window
from floragrad.torch.distributed.collectives import Ranks, all_reduce_shards, split_groups, to_local
from floragrad.torch.part import EVERYWHERE, ShardSum

_INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_alike(said: Sequence[int], what: str) -> None:
    """Refuse ranks that have said different things.

    Raises:
        RuntimeError: On all ranks alike.
    """
    if len(set(said)) > 1:
        raise RuntimeError(_difference(said, what))


def shard_difference(window: Window, entries: Iterable[ParamEntry], settings: Settings, *, same_weights: bool) -> str:
    """Return how the windows of the processes that share tensors differ; empty where they do not.

    Args:
        window: This rank's.
        entries: The parameters; nothing is compared where none is split.
        settings: The options of the sketches.
        same_weights: True if gradients are averaged over these processes before they are weighted.
    """
    entries = list(entries)
    groups = list(split_groups((entry.part, entry.param.device) for entry in entries))
    if not groups:
        return ""
    layout = crc32(repr((settings, [entry.tensor_id for entry in entries])).encode())
    (weights,) = struct.unpack("q", struct.pack("d", window.total_weight)) if same_weights else (0,)
    values = {
        "parameters or options of the accumulator (as checksums)": layout,
        "the number of the window": window.index,
        "the micro-batches that they have kept": window.kept,
        "the weights of their micro-batches, which FSDP2 has averaged before (as checksums)": weights,
    }
    differences = []
    for ranks, device in groups:
        said = zip(*ranks.all_gather(list(values.values()), device), strict=True)
        differences += [_difference(each, what) for what, each in zip(values, said, strict=True) if len(set(each)) > 1]
    return differences[0] if differences else ""


def _difference(said: Sequence[int], what: str) -> str:
    return (
        f"the ranks differ in {what}: {list(said)}; construct their accumulators alike, over the same parameters in "
        "the same order, and let all of them end, drop and load the same windows"
    )


def check_replicas(entries: Sequence[ParamEntry], ranks: Ranks, window: int) -> None:
    """Compare checksums of the weights over the replicas; of shards, over the replicas of each shard.

    Args:
        entries: The parameters.
        ranks: The replicas.
        window: Index of the window, for the message.

    Raises:
        RuntimeError: Naming the first parameter that differs anywhere, on all processes alike.
    """
    device = entries[0].param.device
    checksums = torch.stack([_checksum(to_local(entry.param)).to(device) for entry in entries])
    said = ranks.all_gather(checksums.tolist(), device)
    differing = [
        torch.tensor(len(set(each)) > 1, dtype=torch.float32, device=entry.param.device)
        for entry, each in zip(entries, zip(*said, strict=True), strict=True)
    ]
    # A process whose own shards are equal must not go on alone.
    all_reduce_shards(
        ShardSum(differs, EVERYWHERE, entry.part, entry.tensor_id)
        for entry, differs in zip(entries, differing, strict=True)
        if entry.part is not None
    )
    for number, (entry, differs) in enumerate(zip(entries, differing, strict=True)):
        if differs:
            raise RuntimeError(
                f"{entry.name} differs between the replicas in window {window} (checksums here: "
                f"{[each[number] for each in said]}): they began with other weights, or something besides this "
                "accumulator has changed some; broadcast the weights, or load the last checkpoint on all of them"
            )


def _checksum(values: Tensor) -> Tensor:
    """Return the sum of a tensor's bits as integers, modulo 2**64; one differing element changes it."""
    return values.detach().contiguous().view(_INTEGERS[values.element_size()]).sum(dtype=torch.int64)
