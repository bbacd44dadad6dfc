"""Float32 arithmetic for parameters and gradients of lower precision."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from floragrad.jax.sharding import abstract_with_dtype


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run a transformation on float32 copies of gradients and parameters; float64 stays float64.

    optax computes and stores second moments in the dtype of its inputs: in bfloat16 an average with a decay of less
    than 1/256 a step stands still. Updates are returned in the gradients' dtype.

    Args:
        inner: The transformation.

    Example:
        >>> state = in_float32(optax.scale_by_factored_rms()).init(jnp.zeros(4, jnp.bfloat16))
        >>> state.v.dtype
        dtype('float32')
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return inner.init(
            jax.tree.map(lambda param: abstract_with_dtype(param, _promoted_dtype(param)), as_arrays(params))
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, params = as_arrays(updates), as_arrays(params)
        new_updates, state = inner.update(_promoted(updates), state, _promoted(params), **extra)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), new_updates, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def as_arrays(tree: Any) -> Any:
    """Convert the numbers and NumPy arrays of a tree to JAX arrays."""

    def convert(leaf: Any) -> Any:
        return jnp.asarray(leaf) if isinstance(leaf, (int, float, np.ndarray, np.generic)) else leaf

    return jax.tree.map(convert, tree)


def _promoted_dtype(array: Any) -> Any:
    return jnp.promote_types(array.dtype, jnp.float32)


def _promoted(tree: Any) -> Any:
    def promote(array: Array) -> Array:
        return array.astype(_promoted_dtype(array))

    return jax.tree.map(promote, tree)
