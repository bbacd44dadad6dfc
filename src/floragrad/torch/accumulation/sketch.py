"""Sketch of one tensor's sum of gradients over a window."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from floragrad._streams import Stream
from floragrad.policy import AccumulatorPlan, MatrixView
from floragrad.policy import Projection as ProjectionKind
from floragrad.torch.backends.cpu.fold import can_fold, fold_native
from floragrad.torch.backends.triton import step as triton
from floragrad.torch.part import Part
from floragrad.torch.projection import Projection, draw_projection
from floragrad.torch.random import Philox
from floragrad.torch.storage import Block, RoundingBits, StoredRows, block_elements, load, row_blocks, save
from floragrad.torch.validation import Layout, check_sketch, validate_gradient

FOLD_ELEMENTS: Final = 2**15
"""Least elements of a block: smaller temporaries would cost more in launches than they save."""
COLUMN_DECAY: Final = 0.9
"""Decay of the columns' mean squares from window to window."""
COLUMN_FLOOR: Final = 0.01
"""Least mean square of a column, in units of the mean over columns."""


class GradientSketch:
    """Low-bit sum C ← C + w·encode(G), where E[decode(C)] is the sum of w·G.

    At ρ = 1 nothing is projected, and with float32 storage the sum is exact. With low-bit storage, elements that
    share a scale should be of one magnitude, since the rounding errors of large ones exceed small ones: at ρ = 1
    columns are divided by their root mean square in earlier windows before they are rounded. Blocks of rows are
    processed one by one, so no second tensor of the gradient's size exists.

    Args:
        plan: Shape and format of the sketch.
        projection: ``"sign"`` or ``"gaussian"``.
        seed: Of projections and of rounding.
        tensor_id: Key of the tensor's random streams.
        device: Where the buffers are allocated; they follow the gradients if those move.
        rank: Of several processes: each rounds with bits of its own, so that their errors average out.
        part: Local part of the tensor, which the plan is of; None: all of it.
        name: Of the tensor, for messages.

    Attributes:
        tensor_id: That key; it may change while there are no folds.
        folds: Number of gradients in the sketch; with 0 the content of its buffers is undefined.
    """

    def __init__(
        self,
        plan: AccumulatorPlan,
        projection: ProjectionKind,
        seed: int,
        tensor_id: int,
        device: torch.device,
        rank: int = 0,
        part: Part | None = None,
        name: str | None = None,
    ) -> None:
        self.plan = plan
        self._part = part or Part.whole(plan.shape, plan.view)
        self.folds = 0
        self._kind: ProjectionKind = projection
        self._seed = seed
        self.tensor_id = tensor_id
        self._rank = rank
        self._name = f"tensor {tensor_id}" if name is None else name
        self._layout = Layout.of(plan.shape, plan.buffers)
        self._buffers: dict[str, Tensor] = {}
        self._snapshot: dict[str, Tensor] = {}
        self._snapshot_folds = 0
        self._allocate(device)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Buffers ``data``, ``scale``, ``noise`` and ``col_var``, as the plan lists them."""
        return self._buffers

    def add(self, grad: Tensor, weight: float, window: int, *, measure_noise: bool) -> None:
        """Fold a gradient into the sketch.

        Args:
            grad: G, of the plan's shape.
            weight: w.
            window: Index of the window, which has its own projection and rounding.
            measure_noise: Add up the squared rounding errors, which :meth:`squared_norm` subtracts.

        Raises:
            RuntimeError: The gradient is not of the plan's shape, or a buffer not as it was allocated.
        """
        grad = validate_gradient(self._name, grad, self.plan.shape, torch.float32, grad.device)
        self._stored(grad.device)
        if self.folds == 0 and "noise" in self._buffers:
            self._buffers["noise"].zero_()
        if self._is_on_gpu_kernels(grad):
            from floragrad.torch.backends.triton.fold import fold_triton

            self._add_by(fold_triton, grad, weight, window, measure_noise=measure_noise)
        elif self._is_native(grad):
            self._add_by(fold_native, grad, weight, window, measure_noise=measure_noise)
        else:
            self._add_blocks(grad, weight, window, measure_noise=measure_noise)
        self.folds += 1

    @property
    def _is_gaussian(self) -> bool:
        return self.plan.ratio > 1 and self._kind == "gaussian"

    def _is_native(self, grad: Tensor) -> bool:
        """Return whether the native kernels can fold this gradient."""
        return not self._is_gaussian and can_fold(grad, self._buffers, self._part)

    def _is_on_gpu_kernels(self, grad: Tensor) -> bool:
        """Return whether the Triton kernels fold this gradient, and decode into it."""
        return not self._is_gaussian and triton.can_fold(grad, self._buffers, self._part, self.plan.width)

    def _add_by(
        self, fold: Callable[..., None], grad: Tensor, weight: float, window: int, *, measure_noise: bool
    ) -> None:
        fold(
            grad,
            self._buffers,
            self.plan,
            self._column_sizes(grad.device),
            self._part,
            is_first=self.folds == 0,
            weight=weight,
            seed=self._seed,
            tensor_id=self.tensor_id,
            window=window,
            counter=self._counter(window, self.folds),
            measure_noise=measure_noise,
        )

    def _add_blocks(self, grad: Tensor, weight: float, window: int, *, measure_noise: bool) -> None:
        stored = self._stored(grad.device, self._rounding(grad.device, window, self.folds, Stream.ACCUMULATOR_ROUNDING))
        projection, columns = self._projection(window), self._column_sizes(grad.device)
        grads, dtype = grad.reshape(self.plan.view), self.plan.state_dtype
        for block in self._blocks(grad.device):
            fresh = grads[block].float()
            if projection is not None:
                fresh = projection.encode(fresh)
            elif columns is not None:
                fresh = fresh / columns[block[0]]
            if self.folds == 0:
                total = fresh * weight
            else:
                total = load(stored.read(block), dtype, stored.width).add_(fresh, alpha=weight)
            kept = save(total, dtype, stored.bits(block))
            stored.write(block, kept)
            if measure_noise and "noise" in self._buffers:
                self._add_noise(kept, total, None if columns is None else columns[block[0]])

    def snapshot(self) -> None:
        """Copy the sum, for :meth:`restore`."""
        self._snapshot_folds = self.folds
        for key, value in self._buffers.items() if self.folds else ():
            if key != "col_var":
                self._snapshot[key] = self._snapshot[key].copy_(value) if key in self._snapshot else value.clone()

    def restore(self) -> None:
        """Restore the sum of :meth:`snapshot`, and the state of its rounding."""
        self.folds = self._snapshot_folds
        for key, value in self._snapshot.items() if self.folds else ():
            self._buffers[key].copy_(value)

    def fill_zeros(self, device: torch.device) -> None:
        """Fill a sketch without folds with zeros, to sum it with those of other processes.

        Args:
            device: Device for the buffers.
        """
        self._stored(device)
        if self.folds == 0:
            for key in self._buffers.keys() - {"col_var"}:
                self._buffers[key].zero_()
            self.folds = 1

    def stored(self) -> StoredRows:
        """Return the rows, to be sent to other processes."""
        return self._stored(self._buffers["data"].device)

    def begin_sum(self, whole: "GradientSketch", matrices: slice) -> None:
        """Receive the sum of sketches of the whole tensor, of which this is a shard's, by :meth:`write_sum`.

        The noise of this process's own folds is counted here: all shards together have that of all processes.

        Args:
            whole: This process's.
            matrices: Those that the shard has rows of.
        """
        self.folds = 1
        if "noise" in self._buffers:
            self._buffers["noise"].copy_(whole.buffers["noise"])
        if "col_var" in self._buffers:
            self._buffers["col_var"].copy_(whole.buffers["col_var"][matrices])

    def stored_for_sum(self, window: int, *, partial: bool = False) -> StoredRows:
        """Return the rows with the bits that round their sums over processes, for :meth:`write_sum`.

        Args:
            window: Index of the window.
            partial: True for a sum that is summed and rounded once more: it has other bits.
        """
        device = self._buffers["data"].device
        return self._stored(device, self._rounding(device, window, int(partial), Stream.EXCHANGE_ROUNDING))

    def write_sum(self, block: Block, parts: list[tuple[Tensor, ...]], stored: StoredRows) -> None:
        """Replace some rows by their sum over several processes, and add its rounding error to the noise.

        Args:
            block: The rows.
            parts: Their storage in each process.
            stored: From :meth:`stored_for_sum`.
        """
        columns = self._column_sizes(self._buffers["data"].device)
        dtype, width = self.plan.state_dtype, self.plan.width
        total = torch.stack([load(part, dtype, width) for part in parts]).sum(0)
        kept = save(total, dtype, stored.bits(block))
        stored.write(block, kept)
        if "noise" in self._buffers:
            self._add_noise(kept, total, None if columns is None else columns[block[0]])

    def squared_norm(self) -> Tensor:
        """Return ‖C‖² less the squared rounding errors: an unbiased estimate of the squared norm of the sum of w·G.

        Columns count in their original scale. Every rounding error has mean zero given those before it, so their
        expected share of ‖C‖² is exactly the sum of their squares. A single estimate can be negative.
        """
        total = torch.zeros((), dtype=torch.float32, device=self._buffers["data"].device)
        stored, columns = self._stored(total.device), self._column_sizes(total.device)
        for block in self._blocks(total.device):
            rows = load(stored.read(block), self.plan.state_dtype, stored.width)
            if columns is not None:
                rows.mul_(columns[block[0]])
            total += torch.linalg.vector_norm(rows).square_()
        return total - self._buffers["noise"] if "noise" in self._buffers else total

    def decode_into(
        self, grad: Tensor, window: int, grad_weight: float, factor: float | Tensor, *, orthogonal: bool = False
    ) -> None:
        """Replace ``grad`` by factor · (grad_weight · grad + decode(C)).

        Args:
            grad: Contiguous, of the plan's shape; not read where ``grad_weight`` is 0.
            window: As in :meth:`add`.
            grad_weight: Weight of the values in ``grad``.
            factor: Factor of the result, a number or a tensor of one element.
            orthogonal: Decode with (P Pᵀ)⁻¹ P, to the orthogonal projection of the sum instead of an unbiased estimate.
        """
        if isinstance(factor, Tensor):
            factor = factor.to(grad.device)
        stored, columns = self._stored(grad.device), self._column_sizes(grad.device)
        if self._is_on_gpu_kernels(grad):
            from floragrad.torch.backends.triton.fold import decode_triton

            streams = {"seed": self._seed, "tensor_id": self.tensor_id, "window": window}
            squares = decode_triton(
                grad,
                self._buffers,
                self.plan,
                columns,
                grad_weight=grad_weight,
                factor=factor,
                orthogonal=orthogonal,
                **streams,
            )
            if squares is not None:
                self._update_column_squares(squares / self.plan.view.rows)
            return
        projection, grads = self._projection(window), grad.view(self.plan.view)
        squares = None if columns is None else torch.zeros_like(self._buffers["col_var"])
        for block in self._blocks(grad.device):
            rows = load(stored.read(block), self.plan.state_dtype, stored.width)
            if projection is not None and orthogonal:
                rows = projection.add_orthogonal_(rows.new_zeros(*rows.shape[:-1], self.plan.view.columns), rows)
            elif projection is not None:
                rows = projection.decode(rows)
            elif columns is not None:
                rows.mul_(columns[block[0]])
            if grad_weight:
                rows = rows.add(grads[block], alpha=grad_weight)
            if squares is not None:
                squares[block[0]] += rows.square().sum(1)
            grads[block] = rows * factor
        if squares is not None:
            self._update_column_squares(squares / self.plan.view.rows)

    def subtract_from(self, exact: Tensor, window: int) -> None:
        """X ← X − C (P Pᵀ)⁻¹ P: subtract the decoded sketch from a contiguous float32 tensor, in place."""
        stored, projection = self._stored(exact.device), self._projection(window)
        whole, columns = exact.view(self.plan.view), self._column_sizes(exact.device)
        for block in self._blocks(exact.device):
            rows = load(stored.read(block), self.plan.state_dtype, stored.width)
            if projection is not None:
                projection.add_orthogonal_(whole[block], -rows)
            else:
                whole[block] -= rows if columns is None else rows * columns[block[0]]

    def state_dict(self) -> dict[str, Any]:
        """Return ``folds`` and the buffers; between two windows ``col_var`` alone."""
        kept = {key: value for key, value in self._buffers.items() if self.folds or key == "col_var"}
        return {"folds": self.folds, **kept}

    def check_loadable(self, saved: dict[str, Any], name: str) -> None:
        """Refuse the sketch of another tensor.

        Raises:
            ValueError: The buffers have other shapes or dtypes, or there is no memory to load them to.
        """
        if self._buffers["data"].is_meta:
            raise ValueError(
                f"{name} is on the meta device, where its sketch would be lost: give the model memory first "
                "(model.to_empty(device=...)), and construct optimizer and accumulator of its parameters then"
            )
        found = {key: (tuple(value.shape), value.dtype) for key, value in saved.items() if key != "folds"}
        expected = {key: (tuple(value.shape), value.dtype) for key, value in self._buffers.items()}
        if found != expected:
            raise ValueError(
                f"the saved sketch of {name} holds {found}, this accumulator keeps {expected}: "
                "it belongs to another model; load the state that was saved with this one"
            )

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load the :meth:`state_dict` of another sketch of the same tensor."""
        self.folds = int(saved["folds"])
        for key, value in self._buffers.items():
            # Between two windows the settings may change; then the columns' averages start anew.
            if self.folds or (key in saved and saved[key].shape == value.shape):
                value.copy_(saved[key])

    def _allocate(self, device: torch.device) -> None:
        self._buffers = {
            key: torch.zeros(buffer.shape, dtype=getattr(torch, buffer.dtype), device=device)
            for key, buffer in self.plan.buffers.items()
        }

    def _stored(self, device: torch.device, rounding: RoundingBits | None = None) -> StoredRows:
        """Return the buffers, as they were allocated, on a device."""
        check_sketch(self._name, self._buffers, self._layout)
        if self._buffers["data"].is_meta:
            self._allocate(device)
        elif self._buffers["data"].device != device:
            self._buffers = {key: value.to(device) for key, value in self._buffers.items()}
        buffers = tuple(self._buffers[key] for key in ("data", "scale") if key in self._buffers)
        return StoredRows(buffers, self.plan.width, self.plan.state_dtype, rounding)

    def _column_sizes(self, device: torch.device) -> Tensor | None:
        """Return the divisors of columns before rounding, (batch, 1, columns); None for columns that are not divided.

        Root mean squares in units of all columns', bounded from below; 1 before the first window has ended.
        """
        if "col_var" not in self._buffers:
            return None
        squares = self._buffers["col_var"].to(device)
        mean = squares.mean(-1, keepdim=True)
        relative = torch.where(mean > 0, squares / mean, 1.0)
        return relative.add_(COLUMN_FLOOR).sqrt_().unsqueeze(-2)

    def _update_column_squares(self, squares: Tensor) -> None:
        """Update the average of the columns' mean squares with those of a window; the first sets it."""
        average = self._buffers["col_var"]
        is_known = average.mean(-1, keepdim=True) > 0
        decay = is_known.to(average.dtype) * COLUMN_DECAY  # torch.where of two scalars has the default dtype
        updated = squares + decay * (average - squares)
        average.copy_(torch.where(updated.isfinite(), updated, average))

    def _add_noise(self, kept: tuple[Tensor, ...], exact: Tensor, columns: Tensor | None) -> None:
        """Add the squared error of a rounding to the noise."""
        error = load(kept, self.plan.state_dtype, self.plan.width).sub_(exact)
        if columns is not None:
            error.mul_(columns)
        self._buffers["noise"] += torch.linalg.vector_norm(error).square_()

    def _rounding(self, device: torch.device, window: int, folds: int, stream: Stream) -> RoundingBits | None:
        """Return the random bits for the next fold of a window, or for its sum over processes."""
        if self.plan.state_dtype == "float32":
            return None
        source = Philox(self._seed, self.tensor_id, self._counter(window, folds), stream)
        return self._part.draw_rounding(source, self.plan.width, slice(None), device)

    def _counter(self, window: int, folds: int) -> int:
        """Return a counter of window (below 2**32), rank and fold (both below 2**16)."""
        return (window << 32) | (self._rank << 16) | folds

    def _projection(self, window: int) -> Projection | None:
        if self.plan.ratio == 1:
            return None
        source = Philox(self._seed, self.tensor_id, window, Stream.ACCUMULATOR)
        device = self._buffers["data"].device
        return draw_projection(self._kind, self.plan.view, self.plan.width, source, device)

    def _blocks(self, device: torch.device) -> Iterator[Block]:
        return fold_blocks(self.plan.view, device, gaussian=self._is_gaussian)


def fold_blocks(view: MatrixView, device: torch.device, *, gaussian: bool = False) -> Iterator[Block]:
    """Yield batches and rows of a gradient, the largest block first, as in :func:`row_blocks`."""
    elements = max(block_elements(view.numel, device), min(view.numel, FOLD_ELEMENTS))
    return row_blocks(view, elements, gaussian=gaussian)
