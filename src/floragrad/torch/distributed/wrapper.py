"""DistributedDataParallel around a model whose gradients the accumulator averages."""

import weakref
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Unsynced:
    """Keeps wrappers in the state of their ``no_sync()`` until :meth:`release`.

    Wrappers with a parameter under accumulation are held. Deletion of this object releases them too.
    """

    def __init__(self) -> None:
        self._held: list[DistributedDataParallel] = []
        weakref.finalize(self, _average_again, self._held).atexit = False

    def hold(self, model: nn.Module, trained: Iterable[Tensor]) -> None:
        """Stop the averaging of every wrapper in a model that holds a parameter with a window."""
        wanted = {id(param) for param in trained}
        for module in model.modules():
            if isinstance(module, DistributedDataParallel) and module not in self._held:
                if wanted.isdisjoint(id(param) for param in module.parameters()):
                    continue
                module.require_backward_grad_sync = False
                self._held.append(module)

    def check(self, trained: Iterable[Tensor]) -> None:
        """Refuse a parameter without a window in a wrapper that is held.

        Raises:
            RuntimeError: With the remedy.
        """
        windows = {id(param) for param in trained}
        for wrapper in self._held:
            for name, param in wrapper.module.named_parameters():
                if param.requires_grad and id(param) not in windows:
                    raise RuntimeError(
                        f"{name} is in no prepared optimizer, and its gradient would not be averaged over the "
                        "processes: prepare an optimizer that trains it, or freeze it (requires_grad_(False))"
                    )

    def release(self) -> None:
        """Let all wrappers average gradients again."""
        _average_again(self._held)


def _average_again(held: list[DistributedDataParallel]) -> None:
    for wrapper in held:
        wrapper.require_backward_grad_sync = True
    held.clear()
