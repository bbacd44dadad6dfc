"""Maths in float32 whatever parameters and gradients are kept in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from floragrad.jax.sharding import abstract_as


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run a transformation on float32 copies of gradients and parameters; float64 stays what it is.

    optax computes in the dtype of what it is given and keeps its second moments in it: in bfloat16 an average that
    is decayed by less than 1/256 a step stands still. Updates are returned in the gradients' dtype.

    Args:
        inner: What is run.

    Example:
        >>> state = in_float32(optax.scale_by_factored_rms()).init(jnp.zeros(4, jnp.bfloat16))
        >>> state.v.dtype
        dtype('float32')
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return inner.init(jax.tree.map(lambda param: abstract_as(param, _wide(param)), as_arrays(params)))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, params = as_arrays(updates), as_arrays(params)
        moved, state = inner.update(_widened(updates), state, _widened(params), **extra)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def as_arrays(tree: Any) -> Any:
    """A tree whose leaves may be numbers and NumPy arrays, as optax takes them, with JAX arrays in their places."""

    def convert(leaf: Any) -> Any:
        return jnp.asarray(leaf) if isinstance(leaf, (int, float, np.ndarray, np.generic)) else leaf

    return jax.tree.map(convert, tree)


def _wide(array: Any) -> Any:
    return jnp.promote_types(array.dtype, jnp.float32)


def _widened(tree: Any) -> Any:
    def widen(array: Array) -> Array:
        return array.astype(_wide(array))

    return jax.tree.map(widen, tree)
