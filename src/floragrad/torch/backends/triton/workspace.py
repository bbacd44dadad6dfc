"""Workspace of a batch: one buffer for all passes, with a region for each field."""

from collections.abc import Mapping
from math import prod
from typing import Final

import torch
from torch import Tensor

from floragrad.torch.backends.triton.geometry import Geometry
from floragrad.torch.backends.triton.kernels import fields
from floragrad.torch.backends.triton.spec import Spec

_ALIGNMENT: Final = 32
"""Elements of four bytes: 128 bytes, which memory is read by."""

_NORMS: Final = {
    fields.SQUARES.value: fields.NORM.value,
    fields.PARAM_SQUARES.value: fields.PARAM_NORM.value,
}


def regions(spec: Spec, geometry: Geometry) -> dict[int, tuple[int, ...]]:
    """Return the shape of each region for one tensor, by its field; unused regions are missing."""
    batch, rows, columns, width = spec.batch, spec.rows, spec.columns, spec.width
    found: dict[int, tuple[int, ...]] = {}
    if spec.factored:
        found[fields.COL_PARTIALS.value] = (batch, geometry.chunks, columns)
        found[fields.ROW_PARTIALS.value] = (geometry.column_tiles, batch, rows)
        found[fields.ROW_TOTALS.value] = (batch, geometry.pieces)
        found[fields.FACTORS.value] = (batch, columns)
    if spec.learns:
        found[fields.POWER_PARTIALS.value] = (batch, geometry.power_programs, columns)
        found[fields.LEARNER.value] = (batch, columns)
        found[fields.OLD_WEIGHT.value] = (batch, columns)
    if spec.is_split and (spec.factored or spec.learns):
        found[fields.COL_SUMS.value] = (batch, columns)
    if spec.draws_signs:
        found[fields.SIGNS.value] = (columns,)
        if spec.resamples:
            found[fields.OLD_SIGNS.value] = (columns,)
    if spec.rounds_state:
        found[fields.STATE_ROWS.value] = (batch * rows,)
        found[fields.STATE_COLUMNS.value] = (width,)
    if spec.rounds:
        found[fields.PARAM_ROWS.value] = (batch * rows,)
        found[fields.PARAM_COLUMNS.value] = (columns,)
    measured = {fields.SQUARES.value: batch * geometry.tiles.programs}
    if spec.scales:
        measured[fields.PARAM_SQUARES.value] = geometry.measured(spec)
    for field, partials in measured.items():
        found[field] = (partials,)
        if spec.is_split:
            found[_NORMS[field]] = ()
    return found


class Workspace:
    """The regions of a batch of tensors, each (tensors, ...) in a row.

    Args:
        shapes: Of each region for one tensor, by its field.
        tensors: How many tensors.

    Attributes:
        elements: Of four bytes, altogether.
    """

    def __init__(self, shapes: Mapping[int, tuple[int, ...]], tensors: int) -> None:
        self._shapes, self._tensors = shapes, tensors
        self._first: dict[int, int] = {}
        self.elements = 0
        for field in shapes:
            self._first[field] = self.elements
            self.elements += tensors * self._stride(field)

    def offsets(self, fields: range) -> list[tuple[int, int]]:
        """Return where the first tensor's region of each field begins, and how far it is to the next tensor's."""
        return [(self._first.get(field, 0), self._stride(field)) for field in fields]

    def region(self, buffer: Tensor, field: int) -> Tensor:
        """Return a region of all tensors, (tensors, ...)."""
        size, first = prod(self._shapes[field]), self._first[field]
        whole = buffer[first : first + self._tensors * self._stride(field)].view(self._tensors, -1)
        return whole[:, :size].view(self._tensors, *self._shapes[field])

    def allocate(self, device: torch.device) -> Tensor:
        """Return the buffer."""
        return torch.empty(self.elements, dtype=torch.float32, device=device)

    def _stride(self, field: int) -> int:
        return -(-prod(self._shapes[field]) // _ALIGNMENT) * _ALIGNMENT if field in self._shapes else 0
