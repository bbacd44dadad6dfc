"""Which tensors are compressed, to what shape, and how many bytes that takes.

Everything here is decided from a GLOBAL shape and a few settings; no framework is imported. The optimizers
allocate exactly the buffers that :attr:`TensorPlan.buffers` lists, so predicted and actual bytes are one
thing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Final, Literal, NamedTuple

Projection = Literal["sign", "adaptive", "gaussian"]
StateDtype = Literal["float32", "bfloat16", "int8", "int4"]
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
"""State of no dimension, exact integers on the CPU: t, and the number that a tensor's random streams are drawn with."""

STATE_KEYS: Final = frozenset(
    {*SCALAR_STATE, "exp_avg", "exp_avg_scale", "projection_weight", "row_var", "col_var", "variance"}
)
"""Every key of a state; others in ``optimizer.state[parameter]`` are those of wrappers."""

_ITEM_BYTES: Final = {"int64": 8, "float32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}


class MatrixView(NamedTuple):
    """A tensor seen as ``batch`` matrices of ``rows`` x ``columns``."""

    batch: int
    rows: int
    columns: int

    @property
    def aspect(self) -> float:
        """The longer side of one matrix over its shorter side."""
        return max(self.rows, self.columns) / min(self.rows, self.columns)

    @property
    def numel(self) -> int:
        """How many numbers all matrices have."""
        return self.batch * self.rows * self.columns


class Buffer(NamedTuple):
    """One state tensor: its shape and the name of its dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the contiguous tensor."""
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


def matrix_view(shape: Sequence[int], kind: Kind | None = None) -> MatrixView | None:
    """The matrices that a tensor is compressed as, or None for what is never compressed.

    A 2-D tensor is itself. With three or more dimensions, a convolution has the view
    ``(shape[0], prod(shape[1:]))``, any other tensor (stacked experts) is a batch of matrices over the leading
    dimensions. A last dimension below 32 means a convolution where ``kind`` does not say so. 0-D, 1-D and empty
    tensors have no view, nor has any of kind ``"vector"``.

    Args:
        shape: The tensor's global shape.
        kind: The tensor's kind where the caller knows it.

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
    """The dimensions of a tensor's state before its last one; of a tensor without a view, all that it has."""
    if view is None:
        return shape
    return (*shape[:-2], view.rows) if view.batch > 1 else (view.rows,)


def storage(leading: tuple[int, ...], width: int, state_dtype: StateDtype) -> dict[str, Buffer]:
    """The buffers that hold rows of ``width`` numbers: ``data``, and ``scale`` where it is low-bit.

    Args:
        leading: The dimensions before the last.
        width: Numbers in a row.
        state_dtype: ``"float32"``, ``"bfloat16"``, ``"int8"``, or ``"int4"`` (two numbers in a byte).
    """
    if state_dtype in ("float32", "bfloat16"):
        return {"data": Buffer((*leading, width), state_dtype)}
    data = Buffer((*leading, width), "int8")
    if state_dtype == "int4":
        data = Buffer((*leading, ceil(width / 2)), "uint8")
    return {"data": data, "scale": Buffer((*leading, ceil(width / QUANTIZATION_BLOCK)), "float32")}


@dataclass(frozen=True)
class TensorPlan:
    """What is kept for one tensor, decided by :func:`plan_tensor`.

    Attributes:
        shape: The tensor's global shape.
        view: Its matrix view; None where it has none.
        ratio: ρ, the columns that share one number of the momentum; 1 keeps every column.
        width: k, the columns of the momentum: ``ceil(columns / ratio)``.
        momentum: ``"sketch"`` (ρ ≥ 2), ``"whole"`` (every column) or ``"none"``.
        factored: Whether the second moment is a row and a column (else it is as large as the tensor).
        projection: The kind of projection.
        state_dtype: How the momentum is stored.
        reason: Why the momentum is not a sketch; empty where it is one.
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

    @property
    def leading(self) -> tuple[int, ...]:
        """The dimensions of the state before its last one."""
        return leading_shape(self.shape, self.view)

    @property
    def buffers(self) -> Mapping[str, Buffer]:
        """Every state tensor by its key in ``optimizer.state[parameter]``."""
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
        else:
            buffers["variance"] = Buffer(self.shape, "float32")
        return buffers

    @property
    def state_bytes(self) -> int:
        """Bytes of all state tensors."""
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
    kind: Kind | None = None,
    view: MatrixView | None = None,
) -> TensorPlan:
    """Decide what is kept for one tensor.

    With a view of m x n, ρ = ``ratio`` or min(m, n) // ``rank`` (at least 1), and the momentum has
    k = ceil(n / ρ) columns: m·k ≈ rank · max(m, n) numbers.

    Args:
        shape: The tensor's global shape.
        rank: r, of which the ratio is derived; ignored where ``ratio`` is given.
        ratio: ρ itself.
        projection: The kind of projection; ``"adaptive"`` stores one weight per column.
        beta1: None or 0 keeps no momentum.
        factorize_second_moment: False keeps the second moment whole; the momentum stays compressed.
        embedding_momentum: What vocabulary-like tensors keep: ``"none"``, ``"full"`` or ``"compressed"``.
        state_dtype: How the momentum of tensors with a view is stored.
        kind: The tensor's kind where the caller knows it; None calls a matrix vocabulary-like where its longer
            side is above 8,192 and at least 8 times the shorter one, and no tensor of three or more dimensions.
        view: The tensor's matrices where the caller knows them; None goes by :func:`matrix_view`.

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
            view, rank, ratio, embedding_momentum, _vocabulary_sign(shape, view, kind)
        )
    width = ceil(columns / chosen)
    factored = view is not None and factorize_second_moment
    return TensorPlan(shape, view, chosen, width, momentum, factored, projection, state_dtype, reason)


def _matrix_momentum(
    view: MatrixView,
    rank: int | None,
    ratio: int | None,
    embedding_momentum: EmbeddingMomentum,
    sign: str | None,
) -> tuple[Momentum, int, str]:
    """What a tensor with a view keeps: the kind of momentum, ρ, and why it is not a sketch."""
    if sign is not None and embedding_momentum != "compressed":
        why = f"vocabulary-like{sign}" if sign else "vocabulary"
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
    """ρ of a view: as given, or min(m, n) // rank; at least 1, at most one bucket for all columns."""
    chosen = max(1, min(view.rows, view.columns) // (rank or 1)) if ratio is None else ratio
    return min(chosen, view.columns)


def is_vocabulary_like(shape: Sequence[int]) -> bool:
    """Whether a shape alone is that of an embedding or an output head.

    Example:
        >>> is_vocabulary_like((50257, 768)), is_vocabulary_like((4864, 896)), is_vocabulary_like((9000, 1, 3))
        (True, False, False)
    """
    if len(shape) != 2 or 0 in shape:
        return False
    return max(shape) > VOCABULARY_LENGTH and max(shape) >= VOCABULARY_ASPECT * min(shape)


def _vocabulary_sign(shape: Sequence[int], view: MatrixView, kind: Kind | None) -> str | None:
    """None for what is no vocabulary; else the sign of it in words, empty where ``kind`` says so."""
    if kind is not None:
        return "" if kind == "vocabulary" else None
    if not is_vocabulary_like(shape):
        return None
    return f", aspect {view.aspect:.3g} >= {VOCABULARY_ASPECT} and {max(shape)} > {VOCABULARY_LENGTH}"


@dataclass(frozen=True)
class AccumulatorPlan:
    """What a window of gradient accumulation keeps for one tensor, decided by :func:`plan_accumulator`.

    Attributes:
        shape: The tensor's global shape.
        view: Its matrices; a tensor without a matrix view is one column.
        ratio: ρ, the columns that share one number; 1 keeps every column.
        width: k, the columns of the sketch: ``ceil(columns / ratio)``.
        state_dtype: How the sketch is stored.
        reason: Why it is not as asked for; empty where it is.
    """

    shape: tuple[int, ...]
    view: MatrixView
    ratio: int
    width: int
    state_dtype: StateDtype
    reason: str

    @property
    def buffers(self) -> Mapping[str, Buffer]:
        """Every tensor that is kept: ``data``; where it is rounded ``scale`` and ``noise``.

        And where every column is kept in few bits, the columns' mean squares in earlier windows, ``col_var``.
        """
        buffers = storage(self.view[:2], self.width, self.state_dtype)
        if self.state_dtype != "float32":
            buffers["noise"] = Buffer((), "float32")
        if self.ratio == 1 and "scale" in buffers:
            buffers["col_var"] = Buffer((self.view.batch, self.view.columns), "float32")
        return buffers

    @property
    def state_bytes(self) -> int:
        """Bytes of all that is kept."""
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
    """Decide what is kept of one tensor's gradient between the micro-batches of a window.

    Vocabulary-like tensors keep every column, in few bits. What has no matrix view, and what few bits would
    not make smaller, is summed exactly, in float32.

    Args:
        shape: The tensor's global shape.
        ratio: ρ.
        rank: r, of which the ratio is derived where given: min(m, n) // r, at least 1.
        state_dtype: How the sketch is stored.
        kind: The tensor's kind where the caller knows it; None calls a matrix vocabulary-like where its longer
            side is above 8,192 and at least 8 times the shorter one, and no tensor of three or more dimensions.
        view: The tensor's matrices where the caller knows them; None goes by :func:`matrix_view`.

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
    sign = _vocabulary_sign(shape, view, kind)
    if chosen > 1 and sign is not None:
        chosen, reason = 1, f"vocabulary-like{sign}: every column kept"
    plan = AccumulatorPlan(shape, view, chosen, ceil(view.columns / chosen), state_dtype, reason)
    if state_dtype != "float32" and plan.state_bytes >= plan.exact_bytes:
        return AccumulatorPlan(shape, view, 1, view.columns, "float32", "small: summed exactly")
    return plan
