"""Driver of a step: statistics → (all-reduce) → direction → (all-reduce) → apply, on any backend.

Whole tensors are stepped one batch after the other, so that only one batch's temporaries exist. Sharded tensors are
interleaved, so that all of them share every collective: two for all parameters under FSDP2, the columns'
statistics and the updates' norms, and two more where adaptive projections learn their weights; as many for each
further mesh dimension; and for tensors split along their columns one for the sketches of whole rows.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from floragrad.torch.backends import passes_of
from floragrad.torch.context import ParamUpdate
from floragrad.torch.distributed.collectives import all_reduce_shards
from floragrad.torch.part import Passes


def step(
    updates: Sequence[ParamUpdate], passes_of: Callable[[Sequence[ParamUpdate]], Iterable[Passes]] = passes_of
) -> None:
    """Update parameters and their states in place.

    Args:
        updates: At most one for each parameter; of shards, of the same parameters on every device.
        passes_of: Yields the passes of updates; by default those of the backends.
    """
    for passes in passes_of([update for update in updates if not update.ctx.part.split and update.param.numel()]):
        deque(passes, maxlen=0)  # the sums of a whole tensor are complete
    active = list(passes_of([update for update in updates if update.ctx.part.split]))
    while active:
        waiting = [(passes, next(passes, None)) for passes in active]
        active = [passes for passes, shares in waiting if shares is not None]
        all_reduce_shards(share for _, shares in waiting for share in shares or ())
