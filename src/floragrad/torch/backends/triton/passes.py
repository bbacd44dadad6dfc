"""Passes of a step, batch by batch."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from torch import Tensor

from floragrad.torch.adaptive import POWER_ITERATIONS
from floragrad.torch.backends.triton import launches
from floragrad.torch.backends.triton.describe import REGIONS, Located, rows_of, scalars_of, spec_of
from floragrad.torch.backends.triton.geometry import Geometry
from floragrad.torch.backends.triton.kernels import fields
from floragrad.torch.backends.triton.launch import Launch, current_device
from floragrad.torch.backends.triton.launches import Batch
from floragrad.torch.backends.triton.workspace import Workspace, regions
from floragrad.torch.context import ParamUpdate
from floragrad.torch.part import EVERYWHERE, Axis, Passes, ShardSum
from floragrad.torch.random import on_device
from floragrad.torch.validation import increment_versions


class _Planned:
    """Batch with its geometry and the layout of its workspace, before their allocation."""

    def __init__(self, tensors: Sequence[Located]) -> None:
        self.tensors, self.spec = tensors, spec_of(tensors[0])
        self.geometry = Geometry.of(self.spec)
        self.workspace = Workspace(regions(self.spec, self.geometry), len(tensors))

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Rows of the table."""
        return rows_of(self.tensors, self.workspace.offsets(REGIONS))


def passes_of(updates: Sequence[ParamUpdate]) -> Iterator[Passes]:
    """Yield the passes of each batch of tensors; one table, copied once, holds all tensors of a device."""
    devices: dict[torch.device, dict[object, list[Located]]] = {}
    for tensor in map(Located.of, updates):
        batches = devices.setdefault(tensor.update.param.device, {})
        batches.setdefault(tensor.key, []).append(tensor)
    for device, batches in devices.items():
        planned = [_Planned(tensors) for tensors in batches.values()]
        table = on_device(torch.from_numpy(np.concatenate([batch.rows for batch in planned])), device)
        parts = torch.split(table, [len(batch.tensors) for batch in planned])
        for batch, part in zip(planned, parts, strict=True):
            yield _Passes(batch, part, device).run()


class _Passes:
    """Passes over one batch; owner of its workspace."""

    def __init__(self, planned: _Planned, table: Tensor, device: torch.device) -> None:
        self._planned, self._table, self._device = planned, table, device

    def run(self) -> Passes:
        """Update parameters and states in place."""
        planned, spec = self._planned, self._planned.spec
        updates = [tensor.update for tensor in planned.tensors]
        buffer = planned.workspace.allocate(self._device)
        batch = Batch(spec, scalars_of(updates[0].ctx), planned.geometry, len(updates), self._table, buffer)
        self._launch(launches.statistics(batch), launches.between(batch))
        yield self._statistics(batch)
        if spec.is_split and spec.factored:
            self._launch(launches.shard_factors(batch))
        if spec.learns:
            self._launch(launches.learning_start(batch))
            for iteration in range(POWER_ITERATIONS):
                self._launch(launches.power_iteration(batch))
                yield self._sums(batch, fields.POWER_PARTIALS, fields.COL_SUMS, ("rows",))
                self._launch(launches.learning_end(batch, is_last=iteration == POWER_ITERATIONS - 1))
        self._launch(launches.directions(batch))
        yield self._sums(batch, fields.SQUARES, fields.NORM, EVERYWHERE)
        self._launch(launches.application(batch))
        increment_versions(each.param for each in updates)

    def _statistics(self, batch: Batch) -> list[ShardSum]:
        """Return the shares of ‖W‖², of the columns' sums and of the rows' total, tensor by tensor."""
        spec = batch.spec
        if not spec.is_split:
            return []
        shares: list[list[ShardSum]] = []
        if spec.scales:
            shares.append(self._sums(batch, fields.PARAM_SQUARES, fields.PARAM_NORM, EVERYWHERE))
        if spec.factored:
            shares.append(self._shares(batch, fields.COL_SUMS, ("rows",)))
            shares.append(self._shares(batch, fields.ROW_TOTALS, ("rows", "columns")))
        return [share for of_tensor in zip(*shares, strict=True) for share in of_tensor]

    def _sums(self, batch: Batch, partials: tl.constexpr, into: tl.constexpr, axes: tuple[Axis, ...]) -> list[ShardSum]:
        """Add up partial sums of shards, and return them as shares."""
        if not batch.spec.is_split:
            return []
        sums = self._region(batch, into)
        torch.sum(self._region(batch, partials), -2 if partials is fields.POWER_PARTIALS else -1, out=sums)
        return self._shares(batch, into, axes)

    def _shares(self, batch: Batch, name: tl.constexpr, axes: tuple[Axis, ...]) -> list[ShardSum]:
        """Return a region as the shares of one tensor after the other."""
        contexts = [tensor.update.ctx for tensor in self._planned.tensors]
        values = zip(self._region(batch, name), contexts, strict=True)
        return [ctx.shard_sum(value, axes) for value, ctx in values]

    def _region(self, batch: Batch, name: tl.constexpr) -> Tensor:
        return self._planned.workspace.region(batch.workspace, name.value)

    def _launch(self, *several: Launch | None) -> None:
        with current_device(self._device):
            for launch in several:
                if launch is not None:
                    launch.run()
