"""The parameters under accumulation and their hooks: none is taken twice, all are given back."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from floragrad.policy import AccumulatorPlan
from floragrad.torch.accumulation.settings import Settings, listed_parameters
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.accumulation.window import Slot
from floragrad.torch.distributed.lockstep import is_sharded
from floragrad.torch.part import Part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_holder_of: Any = WeakTensorKeyDictionary()
"""The live :class:`Slots` that each parameter is in, by weak reference."""


class Slots:
    """One :class:`Slot` for each trainable parameter, with a hook that sees every gradient.

    Args:
        optimizers: Whose parameters they are.
        settings: What is kept of each.
        sketched: Whether gradients are kept at all.
        hook: Called with the slot whenever a gradient has been added to ``.grad``.
        rank: This process among those that train together.

    Raises:
        RuntimeError: A parameter is in other slots already.
        ValueError: A parameter is sharded in a way that cannot be sketched.
    """

    def __init__(
        self,
        optimizers: tuple[Optimizer, ...],
        settings: Settings,
        sketched: bool,
        hook: Callable[[Slot], None],
        rank: int,
    ) -> None:
        self._optimizers = optimizers
        self._settings = settings
        self._sketched = sketched
        self._hook = hook
        self._rank = rank
        self._slots: dict[Tensor, Slot] = {}
        self.adopt()

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next((param.device for param in self._slots), torch.device("cpu"))

    def adopt(self) -> None:
        """Take in what is trainable and new: at first everything, later groups added and parameters unfrozen."""
        new = [
            each
            for each in listed_parameters(self._optimizers)
            if each.param.requires_grad and each.param not in self._slots
        ]
        for each in new:
            holder = _holder_of.get(each.param)
            if holder is not None and holder() is not None:
                raise RuntimeError(
                    f"{each.name} has a GradientAccumulator already: close() that one first, or use it as a "
                    "context manager"
                )
        settings = self._settings
        for each in new:
            param, plan, part = each.param, settings.plan(each.param.shape, each.kind), None
            if is_sharded(param):
                plan, part = _share(each.name, param, plan)
            sketch = None
            if self._sketched:
                sketch = GradientSketch(
                    plan, settings.projection, settings.seed, each.index, param.device, self._rank, part
                )
            slot = Slot(each.index, each.name, param, each.optimizer, plan, sketch, part)
            hook = partial(_call, self._hook, slot)
            slot.handle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._slots[param] = slot
            _holder_of[param] = weakref.ref(self)

    def release(self) -> None:
        """Remove the hooks and free the sketches."""
        for param, slot in self._slots.items():
            if slot.handle is not None:
                slot.handle.remove()
            _holder_of.pop(param, None)
        self._slots.clear()


def _share(name: str, param: "DTensor", plan: AccumulatorPlan) -> tuple[AccumulatorPlan, Part]:
    """What is kept here of a sharded parameter's gradient, and which part of it that is of.

    Raises:
        ValueError: It is split along its columns, with the way out.
    """
    from floragrad.torch.distributed.shards import part_of

    part = part_of(name, param, plan.view if param.dim() > 1 else None)
    if "columns" in part.split:
        raise ValueError(
            f"{name} of shape {plan.shape} is split along its columns ({param.placements}), and a sketch is of whole "
            "rows: accumulate exactly (FSDPModule.set_requires_gradient_sync), or split it along its rows"
        )
    return replace(plan, shape=tuple(param.to_local().shape), view=part.view), part


def _call(hook: Callable[[Slot], None], slot: Slot, _: Tensor) -> None:
    hook(slot)
