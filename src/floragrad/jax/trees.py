"""Trees of optimizer state: paths, specs and transposition."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.typing import DTypeLike


def leaf_path(path: Any) -> str:
    """Return the keys along a path of ``jax.tree_util``, separated by ``/``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def array_spec(shape: Sequence[int], dtype: DTypeLike) -> Any:
    """Return the shape and dtype of an array, without memory."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype)  # type: ignore[no-untyped-call]


def unzip(structure: Any, tuples: Iterable[tuple[Any, ...]], length: int) -> tuple[Any, ...]:
    """Turn one tuple for each leaf of a tree into a tuple of trees.

    Args:
        structure: Structure of the trees.
        tuples: One tuple for each leaf, in order.
        length: Number of elements of each tuple; a tree without leaves, as optax.tree.map_params has, gives as many.
    """
    fields = list(zip(*tuples, strict=True)) or [()] * length
    return tuple(map(structure.unflatten, fields))
