"""Local part of a tensor: all of it, or a shard."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from floragrad.policy import MatrixView, leading_shape
from floragrad.torch.random import Philox, Request, draw_words, half_count, halves
from floragrad.torch.storage import RoundingBits

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

Axis = Literal["batch", "rows", "columns"]
EVERYWHERE: tuple[Axis, ...] = ("batch", "rows", "columns")


@dataclass(frozen=True)
class Part:
    """Local part of a tensor's matrix view.

    Attributes:
        view: Its (batch, rows, columns).
        shape: The whole tensor's dimensions before the last one of its state: one element for each row.
        leading: The local slice of each of them.
        columns: The local columns.
        split: Mesh dimensions by the axis of the view that they split; axes that are whole are missing.
        column_parts: Number of parts along the columns.
        mesh: Device mesh of the tensor; None where it is whole.
    """

    view: MatrixView
    shape: tuple[int, ...]
    leading: tuple[slice, ...]
    columns: slice
    split: Mapping[Axis, tuple[int, ...]] = field(default_factory=dict)
    column_parts: int = 1
    mesh: "DeviceMesh | None" = None

    @classmethod
    def whole(cls, shape: tuple[int, ...], view: MatrixView | None) -> "Part":
        """Return all of a tensor; one without a view is a single column.

        Args:
            shape: The tensor's.
            view: Its matrices.
        """
        leading = leading_shape(shape, view)
        view = view or MatrixView(1, prod(shape), 1)
        return cls(view, leading, tuple(slice(0, size) for size in leading), slice(0, view.columns))

    @cached_property
    def row_count(self) -> int:
        """Number of rows of the whole tensor, over all matrices."""
        return prod(self.shape)

    @cached_property
    def row_words(self) -> tuple[int, int] | None:
        """Index of the first local row, and the stride in rows of local matrices; None where it varies.

        Local rows of one matrix are neighbours, and local matrices at equal distances, as FSDP2 and tensor parallelism
        along one dimension leave them.
        """
        first = sum(each.start * prod(self.shape[axis + 1 :]) for axis, each in enumerate(self.leading))
        cut = [axis for axis, each in enumerate(self.leading) if each != slice(0, self.shape[axis])]
        last = len(self.shape) - 1
        if self.view.batch > 1 and self.leading[-1].stop - self.leading[-1].start == self.view.rows:
            cut = [axis for axis in cut if axis != last]
        is_regular = not cut or (len(cut) == 1 and prod(self.shape[: cut[0]]) == 1)
        return (first, self.shape[-1] if self.shape else 1) if is_regular else None

    @property
    def irregularity(self) -> str:
        """Reason why kernels, which need whole rows at a regular stride, do not support the part; else empty."""
        if "columns" in self.split:
            return "split along its columns"
        return "split unevenly" if self.row_words is None else ""

    def rounding_request(self, source: Philox, width: int) -> Request:
        """Return the request for the words of :meth:`rounding`.

        Args:
            source: Stream of the whole tensor.
            width: Elements of a row.
        """
        return Request(source, half_count(self.row_count + width))

    def rounding(self, words: Tensor, width: int, columns: slice) -> RoundingBits:
        """Return the words to round the local rows with: the same, however the tensor is split.

        Args:
            words: Drawn as :meth:`rounding_request` says.
            width: Elements of a row.
            columns: The local ones.
        """
        drawn = halves(words, self.row_count + width)
        rows = drawn[: self.row_count].view(self.shape)
        local = rows[self.leading] if self.split else rows
        return RoundingBits(local.reshape(self.view.batch, self.view.rows, 1), drawn[self.row_count :][columns])

    def draw_rounding(self, source: Philox, width: int, columns: slice, device: "torch.device") -> RoundingBits:
        """Draw the words and return them as :meth:`rounding` does."""
        (words,) = draw_words([self.rounding_request(source, width)], device)
        return self.rounding(words, width, columns)


class ShardSum(NamedTuple):
    """Local share of a sum over all parts of a tensor, replaced in place by the sum.

    Attributes:
        value: The share.
        axes: Axes of the view to sum over.
        part: The part.
        order: Id of the tensor, the order of shares in a collective.
    """

    value: Tensor
    axes: tuple[Axis, ...]
    part: Part
    order: int = 0


Passes = Generator[list[ShardSum], None, None]
"""Passes over some tensors, yielding shares of sums, to be added up before the generator resumes.

Statistics (row and column sums of G², ‖W‖² where the step is in its units); two products of power iterations,
where adaptive projections learn their weights; the sketches, where columns are split; ‖D‖². Every backend yields the
same sums of a tensor in the same order, so that devices may use different backends.
"""
