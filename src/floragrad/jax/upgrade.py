"""Upgrade of optimizer states from earlier versions."""

from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from floragrad.jax.state_checks import describe
from floragrad.jax.trees import leaf_path

PROJECTION_ID: Final = "projection_id"


def upgrade_state(state: Any, fresh: Any, kappa: int = 1000) -> Any:
    """Add ``projection_id`` to a state of a version without it.

    In such a state each leaf is numbered by its position, and its projection has the resample index count // kappa;
    seed and positions are taken from ``fresh``. Entries are found by name, so ``state`` may be nested dictionaries and
    lists, as orbax restores without a target. A complete state is returned with its own values.

    Args:
        state: The saved state of :func:`~floragrad.jax.flora`, or of any chain or partition that contains it.
        fresh: ``optimizer.init(params)`` of the same optimizer, with the same parameters.
        kappa: Resampling interval of the saved run; default 1000.

    Returns:
        A state with the structure and shardings of ``fresh``.

    Raises:
        ValueError: An entry is missing or has another shape or dtype.

    Example:
        >>> from floragrad.jax import scale_by_flora
        >>> fresh = scale_by_flora(rank=4).init(jnp.zeros((16, 32)))
        >>> saved = {"count": jnp.int32(2500), "mu": fresh.mu, "mu_scale": fresh.mu_scale}
        >>> upgrade_state(saved, fresh, kappa=1000).projection_id.tolist()
        [0, 0, 2]
    """
    saved = {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}

    def restore(path: Any, leaf: Array) -> Array:
        name = leaf_path(path)
        parts = name.split("/")
        if name not in saved and PROJECTION_ID in parts:
            count = "/".join([*parts[: parts.index(PROJECTION_ID)], "count"])
            return leaf.at[2].set(_entry(saved, count).astype(np.uint32) // kappa)
        value = _entry(saved, name)
        if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"the saved {name} is {describe(value)}, this optimizer's {describe(leaf)}: "
                "give the optimizer that the state was saved from"
            )
        sharded = isinstance(leaf.sharding, NamedSharding)
        return jax.device_put(value, leaf.sharding) if sharded else jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(restore, fresh)


def _entry(saved: dict[str, Any], name: str) -> np.ndarray:
    if name not in saved:
        raise ValueError(f"the saved state has no {name}: give the optimizer that it was saved from")
    return np.asarray(saved[name])
