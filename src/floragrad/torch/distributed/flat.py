"""Flat parameters, one vector made of many tensors, are recognised: their matrices cannot be seen."""

from collections.abc import Sequence

from torch import Tensor


def refuse_flat(names: Sequence[str], params: Sequence[Tensor]) -> None:
    """Refuse parameters that FSDP1 or DeepSpeed's ZeRO-3 have flattened or emptied.

    Raises:
        ValueError: Naming the first of them, and the way out.
    """
    flattened = []
    for name, param in zip(names, params, strict=True):
        # What torch.distributed.fsdp.FlatParameter tells its instances by, without loading it.
        if getattr(param, "_is_flat_param", False):
            raise ValueError(
                f"{name} of shape {tuple(param.shape)} is a flat parameter of FullyShardedDataParallel, which hides "
                "the matrices that it is made of: shard with FSDP2 (torch.distributed.fsdp.fully_shard) instead"
            )
        if hasattr(param, "ds_shape"):
            raise ValueError(
                f"{name} of shape {tuple(param.ds_shape)} is held by DeepSpeed's ZeRO-3 as a vector of "
                f"{param.numel()} numbers: shard with FSDP2 (torch.distributed.fsdp.fully_shard) instead"
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


def exchanged_for_others(params: Sequence[Tensor]) -> RuntimeError:
    """The error of parameters that were put into the groups and are not shards of those that were there.

    DeepSpeed's ZeRO-1 and ZeRO-2 do it with flat ones.
    """
    shapes = ", ".join(str(tuple(param.shape)) for param in params[:3])
    return RuntimeError(
        f"the groups hold parameters that Flora was not given (shapes {shapes}): DeepSpeed's ZeRO exchanges matrices "
        "for flat vectors after the optimizer is made, which hides them; shard with FSDP2 "
        "(torch.distributed.fsdp.fully_shard), or add parameters with add_param_group()"
    )
