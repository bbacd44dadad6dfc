"""Policy of compression: which tensors are compressed, to which shape, and the bytes of their state.

All decisions depend on a GLOBAL shape and a few options; no framework is imported. The optimizers allocate exactly the
buffers of :attr:`TensorPlan.buffers`, so predicted and actual bytes are equal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Final, Literal, NamedTuple

Projection = Literal["sign", "adaptive", "gaussian"]
StateDtype = Literal["float32", "bfloat16", "int8", "int4"]
SecondMomentDtype = Literal["float32", "int8"]
EmbeddingMomentum = Literal["none", "full", "compressed"]
Kind = Literal["matrix", "convolution", "vocabulary", "vector"]
Momentum = Literal["sketch", "whole", "none"]

SMALL_KERNEL: Final = 32
"""A tensor of three or more dimensions whose last one is below this is a convolution."""
VOCABULARY_ASPECT: Final = 8
"""A matrix of unknown kind is vocabulary-like from this aspect ratio on, if it is also long enough."""
VOCABULARY_LENGTH: Final = 8192
"""A matrix of unknown kind is vocabulary-like above this longer side, if its aspect ratio says so as well."""
QUANTIZATION_BLOCK: Final = 64
"""Columns of a row that share one scale in ``int8`` and ``int4`` storage."""

SCALAR_STATE: Final = ("step", "tensor_id")
"""Scalar state, int64 on the CPU: t, and the index of a tensor's random streams."""

STATE_KEYS: Final = frozenset(
    {
        *SCALAR_STATE,
        *("exp_avg", "exp_avg_scale", "projection_weight", "row_var", "col_var", "variance", "variance_scale"),
    }
)
"""All keys of a state; other keys in ``optimizer.state[parameter]`` belong to wrappers."""

_ITEM_BYTES: Final = {"int64": 8, "float32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}


class MatrixView(NamedTuple):
    """View of a tensor as ``batch`` matrices of ``rows`` x ``columns``."""

    batch: int
    rows: int
    columns: int

    @property
    def aspect(self) -> float:
        """Ratio of the longer to the shorter side of one matrix."""
        return max(self.rows, self.columns) / min(self.rows, self.columns)

    @property
    def numel(self) -> int:
        """Number of elements of all matrices."""
        return self.batch * self.rows * self.columns


class Buffer(NamedTuple):
    """Shape and dtype name of one state tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the contiguous tensor."""
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


def matrix_view(shape: Sequence[int], kind: Kind | None = None) -> MatrixView | None:
    """Return the matrix view of a tensor; None for tensors that are never compressed.

    A 2-D tensor is its own view. With three or more dimensions, a convolution has the view
    ``(shape[0], prod(shape[1:]))``, any other tensor (stacked experts) is a batch of matrices over the leading
    dimensions. A last dimension below 32 means a convolution. 0-D, 1-D and empty tensors and those of kind
    ``"vector"`` have no view.

    Args:
        shape: Global shape of the tensor.
        kind: Kind of the tensor; default None, unknown.

    Example:
        >>> matrix_view((64, 3, 7, 7))
        MatrixView(batch=1, rows=64, columns=147)
        >>> matrix_view((8, 4096, 1024))
        MatrixView(batch=8, rows=4096, columns=1024)
        >>> matrix_view((768, 3, 32, 32), kind="convolution")
        MatrixView(batch=1, rows=768, columns=3072)
        >>> matrix_view((4096,)) is None
        True
    """
    if len(shape) < 2 or 0 in shape or kind == "vector":
        return None
    if len(shape) > 2 and (kind == "convolution" or shape[-1] < SMALL_KERNEL):
        return MatrixView(1, shape[0], prod(shape[1:]))
    return MatrixView(prod(shape[:-2]), shape[-2], shape[-1])


def leading_shape(shape: tuple[int, ...], view: MatrixView | None) -> tuple[int, ...]:
    """Return the dimensions of a tensor's state before the last one; all dimensions of a tensor without a view."""
    if view is None:
        return shape
    return (*shape[:-2], view.rows) if view.batch > 1 else (view.rows,)


def storage(leading: tuple[int, ...], width: int, state_dtype: StateDtype) -> dict[str, Buffer]:
    """Return the buffers of rows of ``width`` elements: ``data``, and ``scale`` for low-bit formats.

    Args:
        leading: Dimensions before the last.
        width: Elements of a row.
        state_dtype: ``"float32"``, ``"bfloat16"``, ``"int8"``, or ``"int4"`` (two elements in a byte).
    """
    if state_dtype in ("float32", "bfloat16"):
        return {"data": Buffer((*leading, width), state_dtype)}
    data = Buffer((*leading, width), "int8")
    if state_dtype == "int4":
        data = Buffer((*leading, ceil(width / 2)), "uint8")
    return {"data": data, "scale": Buffer((*leading, ceil(width / QUANTIZATION_BLOCK)), "float32")}


@dataclass(frozen=True)
class TensorPlan:
    """State of one tensor, decided by :func:`plan_tensor`.

    Attributes:
        shape: Global shape of the tensor.
        view: Matrix view; None without one.
        ratio: ρ, the columns that share one element of the momentum; 1 without a projection.
        width: k, the columns of the momentum: ``ceil(columns / ratio)``.
        momentum: ``"sketch"`` (ρ ≥ 2), ``"whole"`` (ρ = 1) or ``"none"``.
        factored: True for a second moment of a row and a column, False for one of the tensor's shape.
        projection: Kind of projection.
        state_dtype: Storage format of the momentum.
        reason: Reason for a momentum that is no sketch; empty for a sketch.
        second_moment_dtype: Storage format of a second moment of a matrix's shape; ``"float32"`` for any other.
    """

    shape: tuple[int, ...]
    view: MatrixView | None
    ratio: int
    width: int
    momentum: Momentum
    factored: bool
    projection: Projection
    state_dtype: StateDtype
    reason: str
    second_moment_dtype: SecondMomentDtype = "float32"

    @property
    def leading(self) -> tuple[int, ...]:
        """Dimensions of the state before the last one."""
        return leading_shape(self.shape, self.view)

    @property
    def buffers(self) -> Mapping[str, Buffer]:
        """Buffers of the state by their key in ``optimizer.state[parameter]``."""
        buffers = {key: Buffer((), "int64") for key in SCALAR_STATE}
        if self.momentum != "none":
            if self.view is None:
                buffers["exp_avg"] = Buffer(self.shape, "float32")
            else:
                stored = storage(self.leading, self.width, self.state_dtype)
                buffers |= {_MOMENTUM_KEYS[key]: buffer for key, buffer in stored.items()}
        if self.momentum == "sketch" and self.projection == "adaptive" and self.view is not None:
            buffers["projection_weight"] = Buffer((*self.leading[:-1], self.view.columns), "float32")
        if self.factored and self.view is not None:
            buffers["row_var"] = Buffer(self.leading, "float32")
            buffers["col_var"] = Buffer((*self.leading[:-1], self.view.columns), "float32")
        elif self.second_moment_dtype == "float32":
            buffers["variance"] = Buffer(self.shape, "float32")
        else:
            assert self.view is not None
            buffers["variance"] = Buffer(self.shape, "uint8")
            buffers["variance_scale"] = storage(self.leading, self.view.columns, "int8")["scale"]
        return buffers

    @property
    def state_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())


_MOMENTUM_KEYS: Final = {"data": "exp_avg", "scale": "exp_avg_scale"}


def plan_tensor(
    shape: Sequence[int],
    *,
    rank: int | None = 128,
    ratio: int | None = None,
    projection: Projection = "sign",
    beta1: float | None = 0.9,
    factorize_second_moment: bool = True,
    embedding_momentum: EmbeddingMomentum = "none",
    state_dtype: StateDtype = "int8",
    second_moment_dtype: SecondMomentDtype = "float32",
    kind: Kind | None = None,
    view: MatrixView | None = None,
) -> TensorPlan:
    """Decide the state of one tensor.

    With a view of m x n, ρ = ``ratio`` or min(m, n) // ``rank`` (at least 1), and the momentum has
    k = ceil(n / ρ) columns: m·k ≈ rank · max(m, n) elements.

    Args:
        shape: Global shape of the tensor.
        rank: r, for a ratio of min(m, n) // r; ignored with ``ratio``; default 128.
        ratio: ρ, instead of ``rank``; default None.
        projection: Kind of projection, default ``"sign"``; ``"adaptive"`` stores one weight for each column.
        beta1: β₁; default 0.9; None or 0 for no momentum.
        factorize_second_moment: False for a second moment of the tensor's shape; the momentum stays compressed; default
            True.
        embedding_momentum: Momentum of vocabulary-like tensors: ``"none"`` (default), ``"full"`` or ``"compressed"``.
        state_dtype: Storage format of the momentum of tensors with a view; default ``"int8"``.
        second_moment_dtype: Storage format of their second moment where it is not factored; default ``"float32"``.
        kind: Kind of the tensor; default None, unknown: a matrix is then vocabulary-like where its longer side is above
            8,192 and at least 8 times the shorter one; a tensor of three or more dimensions never is.
        view: Matrix view of the tensor; default None, :func:`matrix_view`.

    Example:
        >>> plan = plan_tensor((3072, 768), rank=128, state_dtype="float32")
        >>> plan.ratio, plan.width, plan.state_bytes == 16 + 4 * (3072 * 128 + 3072 + 768)
        (6, 128, True)
    """
    shape = tuple(shape)
    view = view or matrix_view(shape, kind)
    columns = shape[-1] if shape else 1
    chosen = 1
    momentum: Momentum = "whole"
    if not beta1:
        momentum, reason = "none", "beta1 keeps no momentum"
    elif view is None:
        reason = "empty" if 0 in shape else "vector: kept whole, in float32"
    else:
        columns = view.columns
        momentum, chosen, reason = _matrix_momentum(
            view, rank, ratio, embedding_momentum, _vocabulary_reason(shape, view, kind)
        )
    width = ceil(columns / chosen)
    factored = view is not None and factorize_second_moment
    low_bit = second_moment_dtype if view is not None and not factored else "float32"
    return TensorPlan(shape, view, chosen, width, momentum, factored, projection, state_dtype, reason, low_bit)


def _matrix_momentum(
    view: MatrixView,
    rank: int | None,
    ratio: int | None,
    embedding_momentum: EmbeddingMomentum,
    vocabulary: str | None,
) -> tuple[Momentum, int, str]:
    """Return the momentum of a tensor with a view, ρ, and the reason for a momentum that is no sketch."""
    if vocabulary is not None and embedding_momentum != "compressed":
        why = f"vocabulary-like{vocabulary}" if vocabulary else "vocabulary"
        if embedding_momentum == "none":
            return "none", 1, f"{why}: no momentum"
        return "whole", 1, f"{why}: every column kept"
    chosen = _ratio(view, rank, ratio)
    if chosen >= 2:
        return "sketch", chosen, ""
    if ratio is not None:
        return "whole", 1, f"ratio {ratio}: every column kept"
    smaller = min(view.rows, view.columns)
    return "whole", 1, f"rank {rank} > {smaller} // 2: every column kept"


def _ratio(view: MatrixView, rank: int | None, ratio: int | None) -> int:
    """Return ρ of a view, ``ratio`` or min(m, n) // rank, from 1 to the number of columns."""
    chosen = max(1, min(view.rows, view.columns) // (rank or 1)) if ratio is None else ratio
    return min(chosen, view.columns)


def is_vocabulary_like(shape: Sequence[int]) -> bool:
    """Return True for the shape of an embedding or an output head.

    Example:
        >>> is_vocabulary_like((50257, 768)), is_vocabulary_like((4864, 896)), is_vocabulary_like((9000, 1, 3))
        (True, False, False)
    """
    if len(shape) != 2 or 0 in shape:
        return False
    return max(shape) > VOCABULARY_LENGTH and max(shape) >= VOCABULARY_ASPECT * min(shape)


def _vocabulary_reason(shape: Sequence[int], view: MatrixView, kind: Kind | None) -> str | None:
    """Return the reason to take a tensor for a vocabulary, empty for one of that kind; None for any other tensor."""
    if kind is not None:
        return "" if kind == "vocabulary" else None
    if not is_vocabulary_like(shape):
        return None
    return f", aspect {view.aspect:.3g} >= {VOCABULARY_ASPECT} and {max(shape)} > {VOCABULARY_LENGTH}"


@dataclass(frozen=True)
class AccumulatorPlan:
    """Sketch of one tensor's accumulated gradient, decided by :func:`plan_accumulator`.

    Attributes:
        shape: Global shape of the tensor.
        view: Matrix view; a tensor without one is one column.
        ratio: ρ, the columns that share one element; 1 without a projection.
        width: k, the columns of the sketch: ``ceil(columns / ratio)``.
        state_dtype: Storage format of the sketch.
        reason: Reason for a plan that differs from the options; empty otherwise.
    """

    shape: tuple[int, ...]
    view: MatrixView
    ratio: int
    width: int
    state_dtype: StateDtype
    reason: str

    @property
    def buffers(self) -> Mapping[str, Buffer]:
        """Buffers by name: ``data``; for rounded formats ``scale`` and ``noise``.

        For low-bit formats at ρ = 1 also the columns' mean squares in earlier windows, ``col_var``.
        """
        buffers = storage(self.view[:2], self.width, self.state_dtype)
        if self.state_dtype != "float32":
            buffers["noise"] = Buffer((), "float32")
        if self.ratio == 1 and "scale" in buffers:
            buffers["col_var"] = Buffer((self.view.batch, self.view.columns), "float32")
        return buffers

    @property
    def state_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    @property
    def exact_bytes(self) -> int:
        """Bytes of the tensor's gradient in float32."""
        return 4 * self.view.numel


def plan_accumulator(
    shape: Sequence[int],
    *,
    ratio: int = 1,
    rank: int | None = None,
    state_dtype: StateDtype = "int4",
    kind: Kind | None = None,
    view: MatrixView | None = None,
) -> AccumulatorPlan:
    """Decide the sketch of one tensor's gradient between the micro-batches of a window.

    Vocabulary-like tensors are quantized without a projection. Tensors without a matrix view, and those that
    quantization does not make smaller, are summed exactly, in float32.

    Args:
        shape: Global shape of the tensor.
        ratio: ρ; default 1.
        rank: r, for a ratio of min(m, n) // r, at least 1; default None, ``ratio``.
        state_dtype: Storage format of the sketch; default ``"int4"``.
        kind: Kind of the tensor; default None, unknown: a matrix is then vocabulary-like where its longer side is above
            8,192 and at least 8 times the shorter one; a tensor of three or more dimensions never is.
        view: Matrix view of the tensor; default None, :func:`matrix_view`.

    Example:
        >>> plan = plan_accumulator((768, 3072))
        >>> plan.state_bytes == 768 * (3072 // 2 + 4 * 3072 // 64) + 4 * 3072 + 4
        True
    """
    shape = tuple(shape)
    view = view or matrix_view(shape, kind)
    if view is None:
        return AccumulatorPlan(shape, MatrixView(1, prod(shape), 1), 1, 1, "float32", "vector: summed exactly")
    chosen, reason = _ratio(view, rank, ratio if rank is None else None), ""
    vocabulary = _vocabulary_reason(shape, view, kind)
    if chosen > 1 and vocabulary is not None:
        chosen, reason = 1, f"vocabulary-like{vocabulary}: every column kept"
    plan = AccumulatorPlan(shape, view, chosen, ceil(view.columns / chosen), state_dtype, reason)
    if state_dtype != "float32" and plan.state_bytes >= plan.exact_bytes:
        return AccumulatorPlan(shape, view, 1, view.columns, "float32", "small: summed exactly")
    return plan
