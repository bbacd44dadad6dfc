"""What is compressed of a tree of parameters, what is not, why, and in how many bytes."""

from math import prod
from typing import Any

import jax
import optax
from jax import Array
from jax.typing import DTypeLike

from floragrad._checks import DEFAULT_RANK
from floragrad._report import Report, ReportRow
from floragrad.jax.axes import Layout, MatrixAxesOrFn
from floragrad.jax.options import check_static, resolve
from floragrad.jax.precision import as_arrays
from floragrad.policy import EmbeddingMomentum, Projection, StateDtype, TensorPlan, storage

_COUNT_BYTES = 4  # int32
_ID_BYTES = 3 * 4  # uint32


def flora_report(
    params: Any,
    rank: int | None = DEFAULT_RANK,
    b1: float | Array | None = 0.9,
    *,
    ratio: int | None = None,
    projection: Projection = "sign",
    embedding_momentum: EmbeddingMomentum = "none",
    mu_dtype: StateDtype | DTypeLike = "int8",
    factored: bool = True,
    min_dim_size_to_factor: int = 1,
    matrix_axes: MatrixAxesOrFn = None,
) -> Report:
    """What :func:`floragrad.jax.flora` keeps for every parameter, why, and in how many bytes.

    The bytes are those of the state that ``flora`` makes of float32 or lower parameters, to the byte; schedules
    count their steps in 4 more. Masked leaves (:class:`optax.MaskedNode`, None) have no state and no row: give the part
    of the tree that is trained. ``print`` it for a table.

    Args:
        params: Parameters, or their shapes (:class:`jax.ShapeDtypeStruct`): nothing is computed.
        rank: This and all others as in :func:`floragrad.jax.flora`.
        b1: Decay of the momentum; None or 0 keeps none.
        ratio: ρ itself.
        projection: ``"adaptive"`` stores n floats more.
        embedding_momentum: What embedding-like arrays keep.
        mu_dtype: Storage of the momentum.
        factored: False keeps the second moment whole.
        min_dim_size_to_factor: Matrices with a shorter side than this keep the second moment whole.
        matrix_axes: Which axes are inputs and outputs.

    Raises:
        ValueError: An option has a wrong value, or options contradict each other.

    Example:
        >>> import jax.numpy as jnp
        >>> report = flora_report({"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}, rank=64)
        >>> report.rows[0].ratio, report.state_bytes < report.adamw_bytes / 20
        (8, True)
    """
    params = as_arrays(params)
    check_static(min_dim_size_to_factor=min_dim_size_to_factor)
    options = resolve(
        rank=rank,
        ratio=ratio,
        b1=b1,
        kappa=1,
        projection=projection,
        residual=None,
        seed=0,
        embedding_momentum=embedding_momentum,
        mu_dtype=mu_dtype,
        matrix_axes=matrix_axes,
    )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    rows = []
    for (path, param), (layout, plan) in zip(leaves, options.plans(params), strict=True):
        kept = _momentum_bytes(layout, plan) + _second_moment_bytes(layout, factored, min_dim_size_to_factor)
        rows.append(
            ReportRow(
                name=jax.tree_util.keystr(path, simple=True, separator="/") or "parameter",
                shape=layout.shape,
                view=layout.view,
                ratio=plan.ratio,
                momentum=plan.momentum,
                state_bytes=kept,
                adamw_bytes=_bytes_of(optax.adamw(0.0), param),
                adafactor_bytes=_bytes_of(optax.adafactor(momentum=0.9), param),
                reason=plan.reason,
            )
        )
    return Report(tuple(rows), shared_bytes=2 * _COUNT_BYTES)


def _momentum_bytes(layout: Layout, plan: TensorPlan) -> int:
    """Of the momentum, of the weights that ``"adaptive"`` learns, and of ``projection_id``."""
    if plan.momentum == "none":
        return 0
    if layout.view is None:
        return 4 * prod(layout.shape)
    batch, rows, columns = layout.view
    learnt = plan.momentum == "sketch" and plan.projection == "adaptive"
    stored = storage((batch, rows), plan.width, plan.state_dtype)
    draws = plan.momentum == "sketch" or plan.state_dtype != "float32"
    return (
        sum(buffer.nbytes for buffer in stored.values())
        + (4 * batch * columns if learnt else 0)
        + (_ID_BYTES if draws else 0)
    )


def _second_moment_bytes(layout: Layout, factored: bool, min_dim_size_to_factor: int) -> int:
    """Of optax's rows and columns, or the whole; it keeps one number in place of what it does not need."""
    if layout.view is None:
        return 4 * (prod(layout.shape) + 2)
    batch, rows, columns = layout.view
    if factored and min(rows, columns) >= min_dim_size_to_factor:
        return 4 * batch * (rows + columns + 1)
    return 4 * batch * (rows * columns + 2)


def _bytes_of(optimizer: optax.GradientTransformation, param: Any) -> int:
    """Bytes of an optimizer's state for one parameter, its count of steps included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, param)))
