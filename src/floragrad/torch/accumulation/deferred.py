"""FSDP2 without a reduction in each micro-batch: sketches of unsharded gradients are reduced once in a window."""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.utils.hooks import RemovableHandle

from floragrad.torch.accumulation.reduce_scatter import ScatteredSketch, reduce_scatter_sketches
from floragrad.torch.accumulation.window import ParamEntry
from floragrad.torch.distributed.collectives import Ranks, to_local


class DeferredReduction:
    """Gradients of a model under FSDP2 before they are reduced, and the reduction of their sketches.

    FSDP2 gives a module whole parameters for its forward and backward passes. A hook on each folds its gradient and
    frees it, so that FSDP2 finds no gradient to reduce. Only public parts of FSDP2 are needed: ``unshard``, ``reshard``
    and ``register_post_accumulate_grad_hook``.

    Args:
        model: A module under ``fully_shard``.

    Raises:
        ValueError: It has no such parameters, or they are not split on dimension 0 over one mesh of one dimension.
    """

    def __init__(self, model: nn.Module) -> None:
        self._unsharded = dict(_unsharded(model))
        if not self._unsharded:
            raise ValueError("defer_reduction is a model without fully_shard: give the one that it was applied to")
        meshes = {param.device_mesh for param in self._unsharded}
        mesh = next(iter(meshes))
        placements = {tuple(param.placements) for param in self._unsharded}
        if len(meshes) > 1 or placements != {(Shard(0),)}:
            raise ValueError(
                f"defer_reduction takes parameters split on dimension 0 over one mesh of one dimension, and these are "
                f"placed as {sorted(map(str, placements))}: give fully_shard the mesh of the shards alone, and the "
                "accumulator the process_group of their replicas"
            )
        self.ranks = Ranks(mesh.get_group(), mesh.get_local_rank(), mesh.size())

    def attach(self, entry: ParamEntry, fold: Callable[[Tensor], None]) -> RemovableHandle:
        """Call a function with the unsharded parameter whenever it has a gradient.

        Raises:
            ValueError: The parameter is of another model, or offloaded.
        """
        assert isinstance(entry.param, DTensor)
        unsharded = self._unsharded.get(entry.param)
        if unsharded is None:
            raise ValueError(f"{entry.name} is no parameter of the model that defer_reduction is given")
        if unsharded.device != to_local(entry.param).device:
            raise ValueError(
                f"{entry.name} is offloaded to {to_local(entry.param).device}, and defer_reduction keeps sketches of "
                f"whole tensors on {unsharded.device}: leave CPUOffloadPolicy or defer_reduction out"
            )
        handle: RemovableHandle = unsharded.register_post_accumulate_grad_hook(fold)  # type: ignore[no-untyped-call]
        return handle

    def begin(self, entries: Iterable[ParamEntry]) -> None:
        """Give all ranks the columns' sizes that the shards have measured."""
        measured = [each for each in self._scattered(entries) if "col_var" in each.whole.buffers]
        for each in measured:
            each.all_columns()
        self.ranks.all_reduce_([each.whole.buffers["col_var"] for each in measured])

    def reduce(self, entries: Iterable[ParamEntry], window: int) -> None:
        """Sum the window's sketches into those of the shards, all processes of the shards together."""
        scattered = list(self._scattered(entries))
        if not scattered:
            return
        device = scattered[0].whole.buffers["data"].device
        held = self.ranks.all_reduce_any([each.whole.folds > 0 for each in scattered], device)
        joined = [each for each, somewhere in zip(scattered, held, strict=True) if somewhere]
        for each in joined:
            each.whole.fill_zeros(device)
        reduce_scatter_sketches(joined, window, self.ranks)
        for each in joined:
            each.whole.folds = 0

    def _scattered(self, entries: Iterable[ParamEntry]) -> Iterator[ScatteredSketch]:
        for entry in entries:
            assert entry.sketch is not None
            assert entry.unreduced is not None
            yield ScatteredSketch.of(entry.unreduced, entry.sketch, self.ranks)


def _unsharded(model: nn.Module) -> Iterator[tuple[DTensor, Tensor]]:
    """Yield each sharded parameter with the whole one that stands for it in forward and backward passes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
            sharded = dict(module.named_parameters(remove_duplicate=False))
            module.unshard()
            whole = dict(module.named_parameters(remove_duplicate=False))
            module.reshard()
            for name, param in sharded.items():
                if whole[name] is not param:
                    assert isinstance(param, DTensor)
                    yield param, whole[name]
