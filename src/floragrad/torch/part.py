"""Which part of a tensor is here: all of it, or a shard's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from floragrad.policy import MatrixView, leading_shape
from floragrad.torch.philox import Philox
from floragrad.torch.quantize import RoundingBits, draw_rounding_bits

Axis = Literal["batch", "rows", "columns"]
EVERYWHERE: tuple[Axis, ...] = ("batch", "rows", "columns")


class ShardSum(NamedTuple):
    """A part's share of a sum over all parts of a tensor: to be replaced, in place, by the sum.

    Attributes:
        value: The share.
        over: The axes of the view along which parts add to it.
    """

    value: Tensor
    over: tuple[Axis, ...]


@dataclass(frozen=True)
class Part:
    """What of a tensor's matrix view is here.

    Attributes:
        view: What is here as (batch, rows, columns).
        shape: The whole tensor's dimensions before the last one of its state: one number for each row.
        leading: What of them is here.
        columns: The columns that are here.
        split: Mesh dimensions by the axis of the view that they split; axes that are whole are missing.
        column_parts: How many parts the columns are in.
    """

    view: MatrixView
    shape: tuple[int, ...]
    leading: tuple[slice, ...]
    columns: slice
    split: Mapping[Axis, tuple[int, ...]] = field(default_factory=dict)
    column_parts: int = 1

    @classmethod
    def whole(cls, shape: tuple[int, ...], view: MatrixView | None) -> "Part":
        """All of a tensor; one without a view is a single column.

        Args:
            shape: The tensor's.
            view: Its matrices.
        """
        leading = leading_shape(shape, view)
        view = view or MatrixView(1, prod(shape), 1)
        return cls(view, leading, tuple(slice(0, size) for size in leading), slice(0, view.columns))

    def rounding(self, source: Philox, width: int, columns: slice, device: torch.device) -> RoundingBits:
        """What to round the rows that are here with: the same whatever is elsewhere.

        Args:
            source: Of the whole tensor's random words.
            width: Numbers in a row.
            columns: Those that are here.
            device: Where they are needed.
        """
        drawn = draw_rounding_bits(source, self.shape, width)
        here = drawn.rows[self.leading] if self.split else drawn.rows
        here = here.reshape(self.view.batch, self.view.rows, 1)
        return RoundingBits(here.to(device), drawn.columns[columns].to(device))
