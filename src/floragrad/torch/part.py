"""Which part of a tensor is here: all of it, or a shard's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal, NamedTuple

from torch import Tensor

from floragrad.policy import MatrixView, TensorPlan

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
        leading: What is here of the dimensions before the last one of the plan's state.
        columns: The columns that are here.
        split: Mesh dimensions by the axis of the view that they split; axes that are whole are missing.
        column_parts: How many parts the columns are in.
    """

    view: MatrixView
    leading: tuple[slice, ...]
    columns: slice
    split: Mapping[Axis, tuple[int, ...]] = field(default_factory=dict)
    column_parts: int = 1

    @classmethod
    def whole(cls, plan: TensorPlan) -> "Part":
        """All of a tensor; one without a view is a single column."""
        view = plan.view or MatrixView(1, prod(plan.shape), 1)
        leading = plan.leading if plan.view else plan.shape
        return cls(view, tuple(slice(0, size) for size in leading), slice(0, view.columns))
