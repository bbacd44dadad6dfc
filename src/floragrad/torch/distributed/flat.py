"""Refusal of flat parameters, vectors of many tensors whose matrices cannot be recovered."""

from collections.abc import Sequence

from torch import Tensor, distributed


def check_not_flat(names: Sequence[str], params: Sequence[Tensor]) -> None:
    """Refuse parameters that FSDP1 or DeepSpeed's ZeRO-3 have flattened or emptied.

    Raises:
        ValueError: Naming the first of them, and the remedy.
    """
    flattened = []
    for name, param in zip(names, params, strict=True):
        # The attribute that identifies torch.distributed.fsdp.FlatParameter, without its import.
        if getattr(param, "_is_flat_param", False):
            raise ValueError(
                f"{name} of shape {tuple(param.shape)} is a flat parameter of FullyShardedDataParallel, which hides "
                "the matrices that it is made of: shard with FSDP2 (torch.distributed.fsdp.fully_shard) instead"
            )
        if hasattr(param, "ds_shape"):
            raise ValueError(
                f"{name} of shape {tuple(param.ds_shape)} is held by DeepSpeed's ZeRO-3 as a vector of "
                f"{param.numel()} elements: shard with FSDP2 (torch.distributed.fsdp.fully_shard) instead"
            )
        if getattr(param, "_fsdp_flattened", False):
            flattened.append((name, param))
    if flattened and all(param.dim() < 2 for _, param in flattened):
        name, param = flattened[0]
        raise ValueError(
            f"{name} has shape {tuple(param.shape)}, a piece of a flat parameter of FullyShardedDataParallel, as all "
            "of its parameters: use_orig_params=True gives matrices back with ShardingStrategy.NO_SHARD only; shard "
            "with FSDP2 (torch.distributed.fsdp.fully_shard) instead"
        )


def check_not_flattened(new: Sequence[Tensor], gone: Sequence[Tensor]) -> None:
    """Refuse a vector that was put into a group in place of its matrices, as DeepSpeed's ZeRO-1 and ZeRO-2 do.

    Args:
        new: Parameters of a group that it did not have.
        gone: Those that it had.

    Raises:
        RuntimeError: The one new parameter is a vector long enough to hold a process's share of all the others.
    """
    is_up = distributed.is_available() and distributed.is_initialized()
    ranks = distributed.get_world_size() if is_up else 1
    if len(new) != 1 or new[0].dim() != 1 or all(param.dim() < 2 for param in gone):
        return
    if new[0].numel() * ranks >= sum(param.numel() for param in gone):
        raise RuntimeError(
            f"a flat vector of shape {tuple(new[0].shape)} has replaced {len(gone)} parameters: DeepSpeed's "
            "ZeRO replaces matrices by flat vectors after the optimizer is made, which hides them; shard with FSDP2 "
            "(torch.distributed.fsdp.fully_shard)"
        )
