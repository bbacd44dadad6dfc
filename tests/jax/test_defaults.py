"""JAX's global defaults change no number: widths, generators and precision are named wherever they matter."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.microbatching import microbatch

from floragrad.jax import compressed_multi_steps, flora, scale_by_flora, sketch_accumulator
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("unoptimized")

X64: list[Callable[[], AbstractContextManager[Any]]] = [lambda: jax.enable_x64(True)]
OTHERS: list[Callable[[], AbstractContextManager[Any]]] = [
    lambda: jax.numpy_dtype_promotion("strict"),
    lambda: jax.numpy_rank_promotion("raise"),
    lambda: jax.default_prng_impl("rbg"),
    lambda: jax.threefry_partitionable(False),
    lambda: jax.default_matmul_precision("bfloat16"),
]
SHAPE, STEPS = (2, 24, 40), 3
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "int8": lambda: flora(1e-2, ratio=5, kappa=2, weight_decay=0.1, multiply_by_parameter_scale=True),
    "adaptive": lambda: scale_by_flora(ratio=5, kappa=2, projection="adaptive", mu_dtype="bfloat16"),
    "gaussian": lambda: scale_by_flora(ratio=5, kappa=2, projection="gaussian", mu_dtype="int4"),
    "multi-steps": lambda: compressed_multi_steps(optax.sgd(0.1), 2, ratio=5),
}


@jax.jit
def course(params: jax.Array, grads: jax.Array, rows: jax.Array) -> Any:
    """The last update and state of every optimizer after an epoch's end, and a gradient from an accumulator."""

    def window() -> Any:
        accumulator = sketch_accumulator(jax.random.key(0, impl="threefry2x32"), 4, ratio=5, state_dtype="int8")
        loss = lambda params, rows: jnp.mean(jnp.square(rows @ params[0]))  # noqa: E731
        return microbatch(jax.grad(loss), 1, 2, accumulator)(params, rows)

    def run(optimizer: optax.GradientTransformation) -> Any:
        step = lambda state, grad: optimizer.update(grad, state, params)[::-1]  # noqa: E731
        return jax.lax.scan(step, optimizer.init(params), grads)

    return window(), {name: run(make()) for name, make in OPTIMIZERS.items()}


def test_float64_gradients_are_accumulated_under_x64() -> None:
    """The first of two in float32, the last one as it is; the update is in float64."""
    with jax.enable_x64(True):
        first, last = jnp.full(4, 0.5, jnp.float64), jnp.full(4, 2.0 + 2.0**-40, jnp.float64)
        optimizer = compressed_multi_steps(optax.sgd(1.0), 2)
        state = optimizer.init(first)
        updates, state = optimizer.update(first, state)
        assert not updates.any()
        updates, _ = optimizer.update(last, state)
        assert updates.dtype == jnp.float64
        np.testing.assert_array_equal(updates, -(np.asarray(first) + np.asarray(last)) / 2)


def drawn() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal(shape, np.float32) for shape in (SHAPE, (STEPS, *SHAPE), (8, 24))]


@pytest.fixture(scope="module")
def expected() -> Any:
    return jax.tree.map(np.asarray, course(*drawn()))


@pytest.mark.parametrize(
    "defaults",
    [
        pytest.param(X64 + OTHERS, id="all"),
        slow(X64, id="x64"),
        slow(OTHERS, id="the others"),
    ],
)
def test_defaults_change_no_number(defaults: list[Callable[[], AbstractContextManager[Any]]], expected: Any) -> None:
    """Bit for bit, dtypes too: payloads, scales, counts and updates."""
    with ExitStack() as stack:
        for each in defaults:
            stack.enter_context(each())
        found = course(*drawn())
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype, path
        np.testing.assert_array_equal(np.asarray(one), other, err_msg=jax.tree_util.keystr(path))
