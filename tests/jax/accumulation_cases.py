"""Trees of gradients that the accumulation tests share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = {
    "kernel": (96, 64),
    "experts": {"kernel": (2, 64, 70)},
    "embedding": (8200, 4),
    "head": (4, 8200),
    "bias": (64,),
    "scale": (),
}
PAIR = {"kernel": (96, 64), "bias": (64,)}


def tree(seed: int, dtype: Any = jnp.float32, shapes: Any = SHAPES) -> Any:
    """Matrices, stacked ones, vocabulary-like ones, a vector and a scalar."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def pair(seed: int) -> Any:
    """A leaf with a sketch and one without, for tests of the windows: XLA compiles each leaf's operations anew."""
    return tree(seed, shapes=PAIR)


def assert_close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Every leaf, relative to its largest number; dtypes too."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        wide = np.asarray(other, np.float64)
        largest = max(1e-30, np.abs(wide).max(initial=0))
        assert np.abs(np.asarray(one, np.float64) - wide).max(initial=0) <= tolerance * largest


def assert_equal(found: Any, expected: Any) -> None:
    """Bit for bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
