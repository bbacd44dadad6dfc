"""States of earlier versions, in the layout of this one."""

from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

PROJECTION_ID: Final = "projection_id"


def upgrade_state(state: Any, fresh: Any, kappa: int = 1000) -> Any:
    """Add ``projection_id`` to a state that was saved before there was one.

    Such a state was written with each leaf numbered by its position, in the projections of epoch count // kappa; the
    seed and the positions are taken from ``fresh``. Entries are found by name, so ``state`` may be nested dictionaries
    and lists, as orbax restores without a target. A state that has everything is returned with its own numbers.

    Args:
        state: What was saved: of :func:`~floragrad.jax.flora`, or of any chain or partition that contains it.
        fresh: ``optimizer.init(params)`` of the same optimizer, with the same parameters.
        kappa: The interval between projections that it was trained with.

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
    saved = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}

    def kept(path: Any, leaf: Array) -> Array:
        name = _name(path)
        parts = name.split("/")
        if name not in saved and PROJECTION_ID in parts:
            count = "/".join([*parts[: parts.index(PROJECTION_ID)], "count"])
            return leaf.at[2].set(_entry(saved, count).astype(np.uint32) // kappa)
        value = _entry(saved, name)
        if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
            found, expected = (f"{each.dtype}{list(each.shape)}" for each in (value, leaf))
            raise ValueError(
                f"the saved {name} is {found}, this optimizer's {expected}: "
                "give the optimizer that the state was saved from"
            )
        sharded = isinstance(leaf.sharding, NamedSharding)
        return jax.device_put(value, leaf.sharding) if sharded else jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(kept, fresh)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _entry(saved: dict[str, Any], name: str) -> np.ndarray:
    if name not in saved:
        raise ValueError(f"the saved state has no {name}: give the optimizer that it was saved from")
    return np.asarray(saved[name])
