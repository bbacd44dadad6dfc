"""Comparison of an optimizer state with the shapes and dtypes that its parameters ask for, when an update is traced."""

from typing import Any, Final

import jax.numpy as jnp
import optax

from floragrad.jax.trees import leaf_path

_REMEDY: Final = (
    "optimizer.init(params) makes a new state for parameters of another shape and for other options; "
    "a cast is for parameters, never for optimizer state"
)


def describe(array: Any) -> str:
    """Return dtype and shape in JAX's notation, for example ``float32[8,16]``; ``none`` for an absent array."""
    return "none" if array is None or isinstance(array, optax.MaskedNode) else f"{array.dtype}{list(array.shape)}"


def check_leaf_state(path: Any, state: Any, expected: Any) -> None:
    """Refuse the state of one leaf where an array has another shape or dtype than expected.

    Args:
        path: The leaf's path in the tree of updates.
        state: A NamedTuple of arrays, with an :class:`optax.MaskedNode` for each absent array.
        expected: A NamedTuple with the same fields, of :class:`jax.ShapeDtypeStruct` or ``optax.MaskedNode``.

    Raises:
        ValueError: With the leaf's path, the array found, the array expected and the remedy.
    """
    for name, found, spec in zip(expected._fields, state, expected, strict=True):
        if describe(found) != describe(spec):
            raise ValueError(
                f"the state of {leaf_path(path) or 'the parameter'} has {name} {describe(found)}, "
                f"expected {describe(spec)}: {_REMEDY}"
            )


def check_count(count: Any) -> None:
    """Refuse a count of steps that is no int32 scalar: a lower precision skips steps.

    Raises:
        ValueError: With the dtype and shape found.
    """
    if (count.shape, count.dtype) != ((), jnp.int32):
        raise ValueError(f"the state has count {describe(count)}, expected int32[]: {_REMEDY}")
