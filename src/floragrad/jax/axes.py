"""Which axes of an array are the inputs and the outputs of its matrices.

PyTorch keeps a linear map as (out, in) and JAX as (in, out); the policy speaks of rows (outputs) and columns
(inputs, along which momentum is sketched). This is where the one becomes the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, NamedTuple

import jax
from jax import Array

from floragrad.policy import MatrixView

TALL: Final = 4
"""A matrix of more than this many times as many rows as columns holds features in its columns, as embeddings do."""


class MatrixAxes(NamedTuple):
    """The axes of one array's matrices; all others count matrices.

    Attributes:
        reduction_axis: The inputs, which a sketch shortens; none (``()``) where the array holds no matrix, and
            is kept whole.
        output_axis: The outputs, which stay as they are.

    Example:
        An attention kernel of (embed, heads, head_dim), and one that goes back:

        >>> query, out = MatrixAxes(0, (1, 2)), MatrixAxes((0, 1), 2)
    """

    reduction_axis: int | Sequence[int] = -2
    output_axis: int | Sequence[int] = -1


MatrixAxesTree = Any
"""A tree of :class:`MatrixAxes`, or None for the default, whose leaves stand for leaves or subtrees of parameters."""
MatrixAxesOrFn = MatrixAxes | MatrixAxesTree | Callable[[Any], MatrixAxesTree] | None


@dataclass(frozen=True)
class Layout:
    """How one leaf is seen as matrices, or that it is not.

    Attributes:
        shape: The leaf's shape.
        stack: The axes that count matrices; all of them where the leaf holds no matrix.
        inputs: The axes that are sketched, as one.
        outputs: The axes that are kept, as one.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def axis(self) -> int:
        """Where the inputs are among the matrices: -2, as in kernels, or -1; whichever needs no transpose."""
        return -1 if not self.inputs or (self.outputs and min(self.outputs) < min(self.inputs)) else -2

    @property
    def order(self) -> tuple[int, ...]:
        """The leaf's axes: stacks, then inputs and outputs."""
        return self.stack + (self.inputs + self.outputs if self.axis == -2 else self.outputs + self.inputs)

    @property
    def matrices(self) -> tuple[int, ...]:
        """The shape with all inputs, and all outputs, as one axis; the leaf's own where it holds no matrix."""
        sizes = tuple(self.shape[axis] for axis in self.stack)
        if not self.inputs:
            return sizes
        inputs, outputs = (prod(self.shape[axis] for axis in axes) for axes in (self.inputs, self.outputs))
        return (*sizes, inputs, outputs) if self.axis == -2 else (*sizes, outputs, inputs)

    @property
    def view(self) -> MatrixView | None:
        """The leaf as the policy sees it: matrices, outputs, inputs."""
        if not self.inputs:
            return None
        return MatrixView(prod(self.matrices[:-2]), self.matrices[-3 - self.axis], self.matrices[self.axis])

    def with_inputs(self, width: int) -> tuple[int, ...]:
        """The shape of the matrices with so many inputs; the leaf's own where it holds no matrix."""
        shape = list(self.matrices)
        if self.inputs:
            shape[self.axis] = width
        return tuple(shape)

    def to_matrices(self, leaf: Array) -> Array:
        """The leaf with inputs and outputs as its last two axes."""
        return leaf.transpose(self.order).reshape(self.matrices)

    def from_matrices(self, matrices: Array) -> Array:
        """The inverse of :meth:`to_matrices`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return matrices.reshape([self.shape[axis] for axis in self.order]).transpose(inverse)


def default_axes(shape: Sequence[int]) -> MatrixAxes:
    """The last axis is the outputs, the one before it the inputs, all before count matrices.

    A matrix that is more than ``TALL`` times as tall as wide is read as (vocabulary, features), whose features are
    sketched, as they are in an output head (features, vocabulary). This decides on axes alone. Whether the matrix is an
    embedding, which keeps no momentum by default, is decided by the policy's own bounds on its longer side and its
    aspect (:func:`floragrad.policy.is_vocabulary_like`), which a matrix may miss that is read this way.

    Example:
        >>> default_axes((768, 3072))
        MatrixAxes(reduction_axis=-2, output_axis=-1)
        >>> default_axes((50257, 768))
        MatrixAxes(reduction_axis=-1, output_axis=-2)
        >>> default_axes((768,))
        MatrixAxes(reduction_axis=(), output_axis=())
    """
    if len(shape) < 2 or 0 in shape:
        return MatrixAxes((), ())
    if len(shape) == 2 and shape[0] > TALL * shape[1]:
        return MatrixAxes(-1, -2)
    return MatrixAxes()


def layouts(params: Any, matrix_axes: MatrixAxesOrFn) -> list[Layout]:
    """One layout for each leaf of the parameters.

    Args:
        params: A tree of anything with a shape.
        matrix_axes: None for :func:`default_axes` everywhere; a :class:`MatrixAxes` for every leaf of two or more
            dimensions; a tree of them (None where the default is meant) whose leaves stand for leaves or
            subtrees of the parameters; or a function from the parameters to such a tree.

    Raises:
        ValueError: An axis is out of range, or named twice.
    """
    if isinstance(matrix_axes, MatrixAxes):
        chosen = [matrix_axes if len(leaf.shape) > 1 else None for leaf in jax.tree.leaves(params)]
    else:
        tree = matrix_axes(params) if callable(matrix_axes) else matrix_axes
        chosen = []
        jax.tree.map(
            lambda axes, part: chosen.extend([axes] * len(jax.tree.leaves(part))), tree, params, is_leaf=_is_axes
        )
    return [_layout(tuple(leaf.shape), axes) for leaf, axes in zip(jax.tree.leaves(params), chosen, strict=True)]


def _is_axes(tree: Any) -> bool:
    return tree is None or isinstance(tree, MatrixAxes)


def _layout(shape: tuple[int, ...], axes: MatrixAxes | None) -> Layout:
    inputs, outputs = (_normalised(shape, each) for each in axes or default_axes(shape))
    everywhere = tuple(range(len(shape)))
    if not inputs or 0 in shape:
        return Layout(shape, everywhere, (), ())
    if len({*inputs, *outputs}) < len(inputs + outputs):
        raise ValueError(
            f"{axes} of an array of shape {shape} names an axis twice: it is an input, an output or neither"
        )
    return Layout(shape, tuple(axis for axis in everywhere if axis not in inputs + outputs), inputs, outputs)


def _normalised(shape: tuple[int, ...], axes: int | Sequence[int]) -> tuple[int, ...]:
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    if not all(-len(shape) <= axis < len(shape) for axis in given):
        raise ValueError(f"axes {given} of an array of shape {shape}: give axes from {-len(shape)} to {len(shape) - 1}")
    return tuple(axis % len(shape) for axis in given)
