"""Where the momentum lives: along the outputs wherever its parameter does, whole along the inputs."""

from math import prod
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from floragrad.jax.axes import Layout


def place(state: Array, param: Any, layout: Layout, *, inputs: bool = False, without: int | None = None) -> Array:
    """A state array of the layout's matrices, sharded along stacks and outputs as its parameter is.

    Where sharding is the compiler's (automatic meshes under ``jit``), and where there is none, it is left as it is.

    Args:
        state: An array with the dimensions of ``layout.matrices``.
        param: The parameter: an array, a tracer, or anything with a shape.
        layout: The parameter as matrices.
        inputs: Whether it is sharded along inputs as well; else each device has all of them.
        without: A dimension that it does not have, -1 or -2.
    """
    sharding = _sharding(param)
    if sharding is None:
        return state
    axes = _matrices_axes(_padded(sharding.spec, len(layout.shape)), layout, inputs)
    if without is not None:
        axes.pop(without)
    if _is_explicit(sharding):
        return _reshard(state, NamedSharding(sharding.mesh, _spec(*axes)))
    while axes and axes[-1] is None:  # as the compiler writes it: other words for the same sharding would recompile
        axes.pop()
    placed: Array = jax.device_put(state, NamedSharding(sharding.mesh, _spec(*axes)))
    return placed


def whole_inputs(leaf: Array, layout: Layout) -> Array:
    """The leaf with every input on every device where its sharding is part of its type; else as it is.

    Under automatic sharding the compiler sums the devices' parts of a sketch; explicit sharding wants to be told.
    """
    return _keeping(leaf, layout.stack + layout.outputs[:1])


def input_shards(leaf: Any, layout: Layout) -> int:
    """Over how many parts the inputs are sharded, where that is known; else 1."""
    sharding = _sharding(leaf)
    if sharding is None or not layout.inputs:
        return 1
    along = _padded(sharding.spec, len(layout.shape))[layout.inputs[0]] or ()
    return prod(sharding.mesh.shape[axis] for axis in ((along,) if isinstance(along, str) else along))


def mergeable(leaf: Array, layout: Layout) -> Array:
    """The leaf with only the outermost of merged axes sharded where sharding is part of its type; else as it is."""
    return _keeping(leaf, layout.stack + layout.inputs[:1] + layout.outputs[:1])


def abstract_as(param: Any, dtype: Any) -> Any:
    """The parameter in another dtype, for its shape and its sharding alone: no memory is taken."""
    if isinstance(param, jax.core.Tracer):
        return param.astype(dtype)
    return jax.ShapeDtypeStruct(param.shape, dtype, sharding=_sharding(param))  # type: ignore[no-untyped-call]


def _keeping(leaf: Array, axes: tuple[int, ...]) -> Array:
    """The leaf with no more than the given axes sharded where sharding is part of its type."""
    sharding = _sharding(leaf)
    if sharding is None or not _is_explicit(sharding):
        return leaf
    given = _padded(sharding.spec, leaf.ndim)
    kept = _spec(*(each if at in axes else None for at, each in enumerate(given)))
    return leaf if list(kept) == given else _reshard(leaf, NamedSharding(sharding.mesh, kept))


def like(leaf: Array, other: Array) -> Array:
    """The leaf, sharded as another one is where sharding is part of the type."""
    sharding = _sharding(other)
    if sharding is None or not _is_explicit(sharding) or jax.typeof(leaf).sharding == sharding:
        return leaf
    return _reshard(leaf, sharding)


def _sharding(leaf: Any) -> NamedSharding | None:
    """The mesh and axes of an array where it has them: a concrete one, or a tracer of an explicit mesh."""
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not any(sharding.spec):
        return None
    return sharding


def _reshard(leaf: Array, sharding: Any) -> Array:
    resharded: Array = jax.sharding.reshard(leaf, sharding)  # type: ignore[no-untyped-call]
    return resharded


def _spec(*axes: Any) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def _is_explicit(sharding: NamedSharding) -> bool:
    return AxisType.Explicit in sharding.mesh.axis_types


def _padded(spec: PartitionSpec, ndim: int) -> list[Any]:
    return [*spec, *[None] * (ndim - len(spec))]


def _matrices_axes(given: list[Any], layout: Layout, inputs: bool) -> list[Any]:
    """How the layout's matrices are sharded: along merged axes as the outermost of them is."""
    stacks = [given[axis] for axis in layout.stack]
    if not layout.inputs:
        return stacks
    within = [given[layout.inputs[0]] if inputs else None, given[layout.outputs[0]] if layout.outputs else None]
    return stacks + (within if layout.axis == -2 else within[::-1])
