"""Sharding of optimizer state: along outputs as the parameter is, replicated along inputs."""

from math import prod
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from floragrad.jax.axes import Layout


def shard_as_param(
    state: Array, param: Any, layout: Layout, *, shard_inputs: bool = False, missing_axis: int | None = None
) -> Array:
    """Shard a state array along stacks and outputs as its parameter is sharded.

    Under automatic meshes and ``jit``, where the compiler chooses shardings, and for parameters without a mesh, the
    array is returned unchanged.

    Args:
        state: An array with the dimensions of ``layout.matrix_shape``.
        param: The parameter: an array, a tracer, or anything with a shape.
        layout: The matrices of the parameter.
        shard_inputs: Shard the inputs as well; default False replicates them.
        missing_axis: A dimension of the matrices that the array lacks, -1 or -2; default None.
    """
    sharding = _sharding(param)
    if sharding is None:
        return state
    axes = _matrix_axes(_padded(sharding.spec, len(layout.shape)), layout, shard_inputs)
    if missing_axis is not None:
        axes.pop(missing_axis)
    if _is_explicit(sharding):
        return _reshard(state, NamedSharding(sharding.mesh, _spec(*axes)))
    while axes and axes[-1] is None:  # the compiler's own notation: another one for the same sharding would recompile
        axes.pop()
    placed: Array = jax.device_put(state, NamedSharding(sharding.mesh, _spec(*axes)))
    return placed


def replicate_inputs(leaf: Array, layout: Layout) -> Array:
    """Replicate a leaf along its inputs under explicit sharding; a no-op otherwise.

    Under automatic sharding the compiler inserts the all_reduce of partial sketches; explicit sharding demands it.
    """
    return _restrict_sharding(leaf, layout.stack + layout.outputs[:1])


def input_shard_count(leaf: Any, layout: Layout) -> int:
    """Return the number of shards of the inputs where it is known, else 1."""
    sharding = _sharding(leaf)
    if sharding is None or not layout.inputs:
        return 1
    along = _padded(sharding.spec, len(layout.shape))[layout.inputs[0]] or ()
    return prod(sharding.mesh.shape[axis] for axis in ((along,) if isinstance(along, str) else along))


def replicate_merged_axes(leaf: Array, layout: Layout) -> Array:
    """Replicate a leaf along merged axes but the outermost, as reshape demands under explicit sharding."""
    return _restrict_sharding(leaf, layout.stack + layout.inputs[:1] + layout.outputs[:1])


def abstract_with_dtype(param: Any, dtype: Any) -> Any:
    """Return shape and sharding of a parameter with another dtype, without memory."""
    if isinstance(param, jax.core.Tracer):
        return param.astype(dtype)
    return jax.ShapeDtypeStruct(param.shape, dtype, sharding=_sharding(param))  # type: ignore[no-untyped-call]


def reshard_like(leaf: Array, other: Array) -> Array:
    """Reshard a leaf as another array is sharded under explicit sharding; a no-op otherwise."""
    sharding = _sharding(other)
    if sharding is None or not _is_explicit(sharding) or jax.typeof(leaf).sharding == sharding:
        return leaf
    return _reshard(leaf, sharding)


def _restrict_sharding(leaf: Array, axes: tuple[int, ...]) -> Array:
    """Replicate a leaf along all but the given axes under explicit sharding."""
    sharding = _sharding(leaf)
    if sharding is None or not _is_explicit(sharding):
        return leaf
    given = _padded(sharding.spec, leaf.ndim)
    restricted = _spec(*(mesh_axes if axis in axes else None for axis, mesh_axes in enumerate(given)))
    return leaf if list(restricted) == given else _reshard(leaf, NamedSharding(sharding.mesh, restricted))


def _sharding(leaf: Any) -> NamedSharding | None:
    """Return mesh and axes of a concrete array, or of a tracer of an explicit mesh; None without any."""
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


def _matrix_axes(given: list[Any], layout: Layout, shard_inputs: bool) -> list[Any]:
    """Return the mesh axes of each dimension of the matrices: those of the outermost of merged axes."""
    stacks = [given[axis] for axis in layout.stack]
    if not layout.inputs:
        return stacks
    within = [given[layout.inputs[0]] if shard_inputs else None, given[layout.outputs[0]] if layout.outputs else None]
    return stacks + (within if layout.axis == -2 else within[::-1])
