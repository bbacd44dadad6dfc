"""Flora for JAX: gradient transformations in optax's manner."""

from floragrad._extras import require

require("jax", "jax")
require("optax", "jax")

from floragrad.jax.alias import flora  # noqa: E402
from floragrad.jax.axes import MatrixAxes  # noqa: E402
from floragrad.jax.transform import ScaleByFloraState, scale_by_flora  # noqa: E402

__all__ = ["MatrixAxes", "ScaleByFloraState", "flora", "scale_by_flora"]
