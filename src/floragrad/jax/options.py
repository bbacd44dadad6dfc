"""Options of :func:`floragrad.jax.scale_by_flora`: their checks and the plans of leaves."""

from dataclasses import dataclass
from math import prod
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from floragrad._checks import (
    SHARED_CHECKS,
    Check,
    DefaultRank,
    check_contradictions,
    check_value,
    is_integer,
    is_number,
    shared_contradictions,
)
from floragrad.jax.axes import Layout, MatrixAxesOrFn, layouts
from floragrad.policy import EmbeddingMomentum, Projection, StateDtype, TensorPlan, plan_tensor

SEED_CHECK: Final[Check] = (
    lambda value: is_integer(value, 0) and value < 2**32,
    "an integer from 0 to 2**32 - 1",
)
"""Check of a seed, one word of a key."""

COUNT_CHECK: Final[Check] = (
    lambda value: is_integer(value, 1) and value < 2**31,
    "an integer >= 1, and below 2**31",
)
"""Check of a number of steps, counted in int32."""

_TRACEABLE: Final[dict[str, Check]] = {
    "b1": (
        lambda value: value is None or (is_number(value) and 0 <= value < 1),
        "a number in [0, 1), or None for no momentum",
    ),
    "kappa": COUNT_CHECK,
    "seed": SEED_CHECK,
}
"""Checks of options that may also be arrays, as with :func:`optax.inject_hyperparams`."""


@dataclass(frozen=True)
class Options:
    """Checked options; names as in :func:`floragrad.jax.scale_by_flora`."""

    rank: int | None
    ratio: int | None
    b1: float | Array | None
    kappa: int | Array
    projection: Projection
    residual: bool
    seed: int | Array
    embedding_momentum: EmbeddingMomentum
    mu_dtype: StateDtype
    matrix_axes: MatrixAxesOrFn

    @property
    def decay(self) -> float | Array:
        """β₁; 0 without momentum."""
        return 0.0 if self.b1 is None else self.b1

    def plans(self, params: Any) -> list[tuple[Layout, TensorPlan]]:
        """Return layout and plan of each leaf of the parameters, from shapes alone."""
        return [(layout, self._plan(layout)) for layout in layouts(params, self.matrix_axes)]

    def _plan(self, layout: Layout) -> TensorPlan:
        # A leaf without matrices is one vector to the policy, whatever its shape.
        shape = layout.shape if layout.view else (prod(layout.shape),)
        return plan_tensor(
            shape,
            rank=self.rank,
            ratio=self.ratio,
            projection=self.projection,
            beta1=None if has_no_momentum(self.b1) else 0.5,
            embedding_momentum=self.embedding_momentum,
            state_dtype=self.mu_dtype,
            view=layout.view,
        )


def has_no_momentum(b1: float | Array | None) -> bool:
    """Return True for a decay of None or 0."""
    return b1 is None or (not isinstance(b1, jax.Array) and b1 == 0)


def check_static(**options: Any) -> None:
    """Refuse arrays for options that determine the shape of the state.

    Raises:
        ValueError: An option is an array, as with :func:`optax.inject_hyperparams`.
    """
    for name, value in options.items():
        if isinstance(value, jax.Array):
            raise ValueError(
                f"{name} shapes the state, so it cannot be an array: "
                f"name it in optax.inject_hyperparams(..., static_args=({name!r}, ...))"
            )


def resolve_options(
    *,
    rank: int | None,
    ratio: int | None,
    b1: float | Array | None,
    kappa: int | Array,
    projection: Projection,
    residual: bool | None,
    seed: int | Array,
    embedding_momentum: EmbeddingMomentum,
    mu_dtype: StateDtype | DTypeLike,
    matrix_axes: MatrixAxesOrFn,
) -> Options:
    """Check the options and fill in defaults that depend on others.

    Raises:
        ValueError: An option has a wrong value, or two options contradict each other.
    """
    if ratio is not None and isinstance(rank, DefaultRank):
        rank = None
    check_static(rank=rank, ratio=ratio)
    named: dict[str, Any] = {
        "rank": rank,
        "ratio": ratio,
        "projection": projection,
        "residual": residual,
        "embedding_momentum": embedding_momentum,
    }
    for name, value in named.items():
        check_value(name, value, SHARED_CHECKS[name])
    for name, number in (("b1", b1), ("kappa", kappa), ("seed", seed)):
        if not isinstance(number, jax.Array):
            check_value(name, number, _TRACEABLE[name])
    dtype: Any = mu_dtype if isinstance(mu_dtype, str) else jnp.dtype(mu_dtype).name
    check_value("mu_dtype", dtype, SHARED_CHECKS["state_dtype"])
    check_contradictions(shared_contradictions(named))
    return Options(
        rank,
        ratio,
        b1,
        kappa,
        projection,
        projection != "gaussian" if residual is None else residual,
        seed,
        embedding_momentum,
        dtype,
        matrix_axes,
    )
