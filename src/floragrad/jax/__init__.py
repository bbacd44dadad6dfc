"""Flora for JAX: gradient transformations in optax's manner."""

from floragrad._extras import require

require("jax", "jax")
require("optax", "jax")
