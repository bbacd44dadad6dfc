"""Axes of an array that are the inputs and the outputs of its matrices.

A linear map is (out, in) in PyTorch and (in, out) in JAX; the policy has rows (outputs) and columns (inputs, the axis
of the sketch). This module converts between the two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, NamedTuple

import jax
from jax import Array

from floragrad.policy import MatrixView

TALL_ASPECT: Final = 4
"""A matrix with more than this many times as many rows as columns is read as an embedding (vocabulary, features)."""


class MatrixAxes(NamedTuple):
    """The axes of one array's matrices; all others count matrices.

    Attributes:
        reduction_axis: The inputs, which a sketch shortens; default -2. ``()`` for an array without a matrix, which is
            not compressed.
        output_axis: The outputs, which a sketch keeps; default -1.

    Example:
        The attention kernels of (embed, heads, head_dim) and (heads, head_dim, embed):

        >>> query, out = MatrixAxes(0, (1, 2)), MatrixAxes((0, 1), 2)
    """

    reduction_axis: int | Sequence[int] = -2
    output_axis: int | Sequence[int] = -1


MatrixAxesTree = Any
"""A tree of :class:`MatrixAxes`, or None for the default, whose leaves stand for leaves or subtrees of parameters."""
MatrixAxesOrFn = MatrixAxes | MatrixAxesTree | Callable[[Any], MatrixAxesTree] | None


@dataclass(frozen=True)
class Layout:
    """Matrices of one leaf.

    Attributes:
        shape: The leaf's shape.
        stack: Axes that count matrices; all axes of a leaf without a matrix.
        inputs: Axes merged into the inputs; empty without a matrix.
        outputs: Axes merged into the outputs.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def axis(self) -> int:
        """Axis of the inputs in the matrices: -2, as in kernels, or -1, whichever needs no transpose."""
        return -1 if not self.inputs or (self.outputs and min(self.outputs) < min(self.inputs)) else -2

    @property
    def order(self) -> tuple[int, ...]:
        """Permutation of the leaf's axes: stacks, then inputs and outputs."""
        return self.stack + (self.inputs + self.outputs if self.axis == -2 else self.outputs + self.inputs)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape with all inputs, and all outputs, as one axis; the leaf's own where it holds no matrix."""
        sizes = tuple(self.shape[axis] for axis in self.stack)
        if not self.inputs:
            return sizes
        inputs, outputs = (prod(self.shape[axis] for axis in axes) for axes in (self.inputs, self.outputs))
        return (*sizes, inputs, outputs) if self.axis == -2 else (*sizes, outputs, inputs)

    @property
    def view(self) -> MatrixView | None:
        """Matrix view of the policy: number of matrices, outputs, inputs."""
        if not self.inputs:
            return None
        return MatrixView(prod(self.matrix_shape[:-2]), self.matrix_shape[-3 - self.axis], self.matrix_shape[self.axis])

    def with_width(self, width: int) -> tuple[int, ...]:
        """Return the shape of the matrices with another number of inputs; the leaf's own shape without a matrix."""
        shape = list(self.matrix_shape)
        if self.inputs:
            shape[self.axis] = width
        return tuple(shape)

    def to_matrices(self, leaf: Array) -> Array:
        """Transpose and reshape a leaf to its matrices."""
        return leaf.transpose(self.order).reshape(self.matrix_shape)

    def from_matrices(self, matrices: Array) -> Array:
        """Invert :meth:`to_matrices`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return matrices.reshape([self.shape[axis] for axis in self.order]).transpose(inverse)


def default_axes(shape: Sequence[int]) -> MatrixAxes:
    """Return the last axis as outputs, the one before it as inputs, all others as axes that count matrices.

    A matrix that is more than ``TALL_ASPECT`` times as tall as wide is read as (vocabulary, features), whose features
    are sketched, as they are in an output head (features, vocabulary). This decides on axes alone: a matrix read this
    way is an embedding, without momentum by default, only within the policy's bounds on its longer side and its aspect
    (:func:`floragrad.policy.is_vocabulary_like`).

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
    if len(shape) == 2 and shape[0] > TALL_ASPECT * shape[1]:
        return MatrixAxes(-1, -2)
    return MatrixAxes()


def layouts(params: Any, matrix_axes: MatrixAxesOrFn) -> list[Layout]:
    """Return the layout of each leaf of the parameters.

    Args:
        params: A tree of anything with a shape.
        matrix_axes: None for :func:`default_axes` everywhere; a :class:`MatrixAxes` for every leaf of two or more
            dimensions; a tree of them (None for the default) whose leaves stand for leaves or
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
