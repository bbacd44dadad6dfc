"""Entries of the parameters under accumulation, and the hooks on their gradients."""

import gc
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from floragrad.policy import AccumulatorPlan, Kind, matrix_view
from floragrad.torch.accumulation.remedies import Remedies
from floragrad.torch.accumulation.settings import ListedParam, Settings, listed_parameters
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.accumulation.window import ParamEntry
from floragrad.torch.distributed.collectives import is_sharded
from floragrad.torch.dynamo import disable_dynamo
from floragrad.torch.part import Part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from floragrad.torch.accumulation.deferred import DeferredReduction

_owners: Any = WeakTensorKeyDictionary()
"""The accumulator of each parameter, by weak reference."""


class Owner(Protocol):
    """Interface of the accumulator that owns some parameters."""

    remedies: Remedies

    def fold(self, entry: ParamEntry) -> None:
        """Fold a gradient that has been added to the parameter's ``.grad``."""
        ...

    def fold_unreduced(self, entry: ParamEntry, unsharded: Tensor) -> None:
        """Fold a gradient of the whole tensor, from the parameter that FSDP2 puts in its place."""
        ...

    def close(self) -> None:
        """Remove the hooks."""
        ...


def owners_of(params: Iterable[Tensor]) -> list[Owner]:
    """Return the live accumulators of these parameters, each once."""
    found = (owner() for owner in (_owners.get(param) for param in params) if owner is not None)
    return list(dict.fromkeys(owner for owner in found if owner is not None))


class ParamEntries:
    """Collection of one :class:`ParamEntry` for each trainable parameter, with a hook on its gradient.

    The hooks hold the accumulator weakly: once nobody else holds it, :meth:`release` can be called.

    Args:
        optimizers: The optimizers of the parameters.
        settings: Options of the sketches.
        sketched: False if no gradient is kept.
        owner: The accumulator; it is called whenever a gradient has been added to ``.grad``.
        rank: This process among those that train together.
        deferred: FSDP2's reduction where it is deferred to the end of the window.

    Raises:
        RuntimeError: A parameter is in other entries already.
        ValueError: A parameter is sharded in a way that cannot be sketched.
    """

    def __init__(
        self,
        optimizers: tuple[Optimizer, ...],
        settings: Settings,
        sketched: bool,
        owner: Owner,
        rank: int,
        deferred: "DeferredReduction | None" = None,
    ) -> None:
        self._optimizers = optimizers
        self._settings = settings
        self._sketched = sketched
        self._owner = weakref.ref(owner)
        self._rank = rank
        self._deferred = deferred
        self._entries: dict[Tensor, ParamEntry] = {}
        self.sync()

    def __iter__(self) -> Iterator[ParamEntry]:
        return iter(self._entries.values())

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next((param.device for param in self._entries), torch.device("cpu"))

    def listed(self) -> Iterator[ListedParam]:
        """Yield all parameters of the optimizers, frozen ones too."""
        return listed_parameters(self._optimizers)

    def sync(self) -> None:
        """Add new trainable parameters of the optimizers; between two windows, remove those that are gone."""
        listed = {each.param: each for each in self.listed()}
        new = [each for param, each in listed.items() if param.requires_grad and param not in self._entries]
        _check_free(new)
        if not any(entry.is_held for entry in self):
            for param in [param for param in self._entries if param not in listed]:
                self._remove(param)
            for param, entry in self._entries.items():
                entry.renumber(listed[param].tensor_id)
        for entry in [self._make_entry(each) for each in new]:
            hook = partial(_call, self._owner, entry)
            entry.handles.append(entry.param.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
            if self._deferred is not None:
                unreduced = partial(_call_unreduced, self._owner, entry)
                entry.handles.append(self._deferred.attach(entry, unreduced))
            self._entries[entry.param] = entry
            _owners[entry.param] = self._owner

    def release(self) -> None:
        """Remove the hooks and free the sketches."""
        for param in list(self._entries):
            self._remove(param)

    def check_listed(self) -> None:
        """Refuse to step where a parameter left its optimizer inside the window.

        Raises:
            RuntimeError: With the remedy.
        """
        listed = {each.param for each in self.listed()}
        for param, entry in self._entries.items():
            if param not in listed:
                raise RuntimeError(
                    f"{entry.name} left the groups of its optimizer inside a window: zero_grad() drops the window, and "
                    "the next one follows the groups; change them between two windows"
                )

    def _remove(self, param: Tensor) -> None:
        entry = self._entries.pop(param)
        for handle in entry.handles:
            handle.remove()
        _owners.pop(param, None)

    def _make_entry(self, each: ListedParam) -> ParamEntry:
        settings = self._settings
        param, whole, part = each.param, settings.plan(each.param.shape, each.kind), None
        plan, sketch, unreduced = whole, None, None
        if is_sharded(param):
            plan, part = _share(each.name, param, plan, each.kind)
        options = settings.projection, settings.seed, each.tensor_id, param.device
        if self._sketched:
            sketch = GradientSketch(plan, *options, self._rank, part, each.name)
        if self._deferred is not None:
            ranks = self._deferred.ranks
            unreduced = GradientSketch(whole, *options, self._rank * ranks.size + ranks.rank, None, each.name)
        return ParamEntry(each.tensor_id, each.name, param, each.optimizer, plan, sketch, unreduced, part)


def _check_free(new: list[ListedParam]) -> None:
    """Refuse a parameter whose gradients go to another accumulator.

    Raises:
        RuntimeError: With the remedy.
    """
    if not owners_of(each.param for each in new):
        return
    gc.collect()  # an unreachable one may be held by a reference cycle
    for each in new:
        for owner in owners_of([each.param]):
            raise RuntimeError(f"{each.name} has a GradientAccumulator already: {owner.remedies.close}")


def _share(name: str, param: "DTensor", plan: AccumulatorPlan, kind: Kind | None) -> tuple[AccumulatorPlan, Part]:
    """Return the plan and the local part of a sharded parameter's gradient.

    Raises:
        ValueError: It is split along its columns, with the remedy.
    """
    from floragrad.torch.distributed.shards import part_of

    part = part_of(name, param, matrix_view(param.shape, kind))
    if "columns" in part.split:
        raise ValueError(
            f"{name} of shape {plan.shape} is split along its columns ({param.placements}), and a sketch is of whole "
            "rows: accumulate exactly (FSDPModule.set_requires_gradient_sync), or split it along its rows"
        )
    return replace(plan, shape=tuple(param.to_local().shape), view=part.view), part


@disable_dynamo
def _call(owner: "weakref.ref[Owner]", entry: ParamEntry, _: Tensor) -> None:
    accumulator = owner()
    if accumulator is not None:
        accumulator.fold(entry)


@disable_dynamo
def _call_unreduced(owner: "weakref.ref[Owner]", entry: ParamEntry, unsharded: Tensor) -> None:
    accumulator = owner()
    if accumulator is not None:
        accumulator.fold_unreduced(entry, unsharded)
