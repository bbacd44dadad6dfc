"""Flora for JAX: gradient transformations for optax."""

from floragrad._extras import require

require("jax", "jax")
require("optax", "jax")

from floragrad.jax.accumulation import sketch_accumulator  # noqa: E402
from floragrad.jax.alias import flora  # noqa: E402
from floragrad.jax.axes import MatrixAxes  # noqa: E402
from floragrad.jax.modules import equinox_axes, flax_axes  # noqa: E402
from floragrad.jax.multi_steps import compressed_multi_steps  # noqa: E402
from floragrad.jax.report import flora_report  # noqa: E402
from floragrad.jax.transform import ScaleByFloraState, scale_by_flora  # noqa: E402
from floragrad.jax.upgrade import upgrade_state  # noqa: E402

__all__ = [
    "MatrixAxes",
    "ScaleByFloraState",
    "compressed_multi_steps",
    "equinox_axes",
    "flax_axes",
    "flora",
    "flora_report",
    "scale_by_flora",
    "sketch_accumulator",
    "upgrade_state",
]
