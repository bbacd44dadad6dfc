"""``matrix_axes`` of module libraries, from the names of their parameters."""

from typing import Any, Final

import jax

from floragrad.jax.axes import MatrixAxes
from floragrad.policy import SMALL_KERNEL

PROJECTIONS: Final = ("query", "key", "value")
NO_MATRIX: Final = MatrixAxes((), ())

_Path = tuple[str, ...]


def flax_axes(params: Any) -> Any:
    """Return the axes of parameters of flax, linen or NNX: ``flora(..., matrix_axes=flax_axes)``.

    The kernels of ``MultiHeadAttention`` are (inputs, heads, head_dim) for query, key and value, and
    (heads, head_dim, outputs) for out; each is one matrix. Their biases (heads, head_dim) are vectors. All other
    parameters have the default axes. Layers that are scanned or vmapped are stacks of such matrices.

    Args:
        params: The parameters of the optimizer.

    Returns:
        A tree of :class:`~floragrad.jax.MatrixAxes`, with None for the default.

    Example:
        >>> import jax.numpy as jnp
        >>> kernels = {"query": {"kernel": jnp.zeros((64, 4, 16))}, "out": {"kernel": jnp.zeros((4, 16, 64))}}
        >>> axes = flax_axes({"attention": kernels})["attention"]
        >>> axes["query"]["kernel"].output_axis, axes["out"]["kernel"].reduction_axis
        ((-2, -1), (-3, -2))
    """
    shapes = {_names(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return jax.tree_util.tree_map_with_path(lambda path, _: _flax(_names(path), shapes), params)


def _flax(names: _Path, shapes: dict[_Path, tuple[int, ...]]) -> MatrixAxes | None:
    if len(names) < 2 or not _is_attention(names[:-2], shapes):
        return None
    module, kind = names[-2:]
    if module in PROJECTIONS:
        return {"kernel": MatrixAxes(-3, (-2, -1)), "bias": NO_MATRIX}.get(kind)
    return MatrixAxes((-3, -2), -1) if (module, kind) == ("out", "kernel") else None


def _is_attention(module: _Path, shapes: dict[_Path, tuple[int, ...]]) -> bool:
    """Return True where the heads of query equal those of out: other layers may have these names."""
    query, out = (shapes.get((*module, name, "kernel"), ()) for name in ("query", "out"))
    return len(query) >= 3 and query[-2:] == out[-3:-1]


def equinox_axes(params: Any) -> Any:
    """Return the axes of parameters of Equinox, in PyTorch's layout: ``flora(..., matrix_axes=equinox_axes)``.

    Linear layers, those of ``MultiheadAttention`` included, are (outputs, inputs); convolutions (outputs, inputs,
    *window), recognised by a last dimension below 32; biases of any shape are vectors.

    Args:
        params: The parameters of the optimizer.

    Returns:
        A tree of :class:`~floragrad.jax.MatrixAxes`.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"linear": {"weight": jnp.zeros((64, 32))}, "conv": {"weight": jnp.zeros((64, 32, 3, 3))}}
        >>> equinox_axes(params)["conv"]["weight"]
        MatrixAxes(reduction_axis=(1, 2, 3), output_axis=0)
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _equinox(_names(path), leaf.shape), params)


def _equinox(names: _Path, shape: tuple[int, ...]) -> MatrixAxes:
    if len(shape) < 2 or (names and names[-1] == "bias"):
        return NO_MATRIX
    if len(shape) > 2 and shape[-1] < SMALL_KERNEL:
        return MatrixAxes(tuple(range(1, len(shape))), 0)
    return MatrixAxes(-1, -2)


def _names(path: Any) -> _Path:
    """Return the names along a path, without the name of the value of an NNX variable."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if names and names[-1] in ("value", "raw_value"):
        names.pop()
    return tuple(names)
