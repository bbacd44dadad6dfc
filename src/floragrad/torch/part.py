"""Which part of a tensor is on this device: all of it, or a shard."""

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
    """The local part of a tensor's matrix view.

    Attributes:
        view: Its (batch, rows, columns).
        shape: The whole tensor's dimensions before the last one of its state: one element for each row.
        leading: The local slice of each of them.
        columns: The local columns.
        split: Mesh dimensions by the axis of the view that they split; axes that are whole are missing.
        column_parts: Number of parts along the columns.
        mesh: The devices that the tensor is spread over; None where it is whole.
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
        """Rows of the whole tensor, over all matrices."""
        return prod(self.shape)

    @cached_property
    def row_words(self) -> tuple[int, int] | None:
        """Number of the first local row among all, and rows from one local matrix to the next; None where they vary.

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
        """Why kernels, which work on whole rows at regular distances, cannot take the part; empty where they can."""
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
        here = rows[self.leading] if self.split else rows
        return RoundingBits(here.reshape(self.view.batch, self.view.rows, 1), drawn[self.row_count :][columns])

    def draw_rounding(self, source: Philox, width: int, columns: slice, device: "torch.device") -> RoundingBits:
        """Draw the words and return them as :meth:`rounding` does."""
        (words,) = draw_words([self.rounding_request(source, width)], device)
        return self.rounding(words, width, columns)


class ShardSum(NamedTuple):
    """A part's share of a sum over all parts of a tensor: to be replaced, in place, by the sum.

    Attributes:
        value: The share.
        over: The axes of the view along which parts add to it.
        part: The part.
        order: Number of the tensor: devices add up their shares in this order.
    """

    value: Tensor
    over: tuple[Axis, ...]
    part: Part
    order: int = 0


Sums = Generator[list[ShardSum], None, None]
"""The passes over some tensors: shares of sums, which are to be added up when the generator goes on.

Statistics (row and column sums of G², ‖W‖² where the step is in its units); product twice, where adaptive projections
learn their weights; the sketches, where columns are split; ‖D‖². Every backend yields the same sums of a tensor in the
same order, so that devices may differ in the backends that they use.
"""
