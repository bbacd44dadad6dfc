"""Report of the optimizer state of a tree of parameters: compression, reasons and bytes."""

import warnings
from math import prod
from typing import Any

import jax
import optax
from jax import Array
from jax.typing import DTypeLike

from floragrad._checks import DEFAULT_RANK
from floragrad._report import Report, ReportRow, low_compression_warning
from floragrad.jax.axes import MatrixAxesOrFn
from floragrad.jax.leaf import Leaf
from floragrad.jax.options import check_static, has_no_momentum, resolve_options
from floragrad.jax.precision import as_arrays
from floragrad.jax.second_moment import moment_shapes
from floragrad.jax.trees import leaf_path
from floragrad.policy import EmbeddingMomentum, Projection, StateDtype

_COUNT_BYTES = 4  # int32


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
    """Report the state of :func:`floragrad.jax.flora` for each parameter, with reasons and bytes.

    The bytes are exact for parameters of float32 or lower precision; a schedule has a count of 4 bytes more. Masked
    leaves (:class:`optax.MaskedNode`, None) have no state and no row: pass the trained part of the tree. ``print``
    and notebooks show a table; ``to_dicts()`` and ``to_pandas()`` return its rows. A warning says why less than half
    of the momentum is compressed; embedding-like arrays and ``ratio=1`` do not count.

    Args:
        params: Parameters, or their shapes (:class:`jax.ShapeDtypeStruct`); nothing is computed.
        rank: This and all other options and defaults as in :func:`floragrad.jax.flora`.
        b1: Decay of the momentum; None or 0 for none.
        ratio: ρ, instead of ``rank``.
        projection: ``"adaptive"`` stores n float32 weights more.
        embedding_momentum: Momentum of embedding-like arrays.
        mu_dtype: Storage format of the momentum.
        factored: False for a second moment that is not factored.
        min_dim_size_to_factor: Shortest side of matrices whose second moment is factored.
        matrix_axes: Axes of inputs and outputs.

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
    options = resolve_options(
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
    rows = []
    paths = jax.tree_util.tree_leaves_with_path(params)
    for index, ((path, param), (layout, plan)) in enumerate(zip(paths, options.plans(params), strict=True)):
        moments = moment_shapes(layout, factored, min_dim_size_to_factor)
        rows.append(
            ReportRow(
                name=leaf_path(path) or "parameter",
                shape=layout.shape,
                view=layout.view,
                ratio=plan.ratio,
                momentum=plan.momentum,
                state_bytes=_bytes(Leaf(options, layout, plan, index).specs)
                + sum(4 * prod(shape) for shape in moments),
                adamw_bytes=_optax_bytes(optax.adamw(0.0), param),
                adafactor_bytes=_optax_bytes(optax.adafactor(momentum=0.9), param),
                reason=plan.reason,
            )
        )
    reasons = low_compression_warning([row for row in rows if not row.reason.startswith("vocabulary-like")])
    if reasons and not has_no_momentum(options.b1) and options.ratio != 1:
        warnings.warn(reasons, UserWarning, stacklevel=2)
    return Report(tuple(rows), shared_bytes=2 * _COUNT_BYTES)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _optax_bytes(optimizer: optax.GradientTransformation, param: Any) -> int:
    """Return the bytes of an optimizer's state for one parameter, with its count."""
    return _bytes(jax.eval_shape(optimizer.init, param))
