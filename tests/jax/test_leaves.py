"""Every leaf that optax takes: numbers, NumPy arrays, scalars and empty arrays; and gradients of every scale."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.microbatching import microbatch

from floragrad.jax import compressed_multi_steps, flora, flora_report, sketch_accumulator
from floragrad.jax.second_moment import scale_by_factored_rms_of_matrices

pytestmark = pytest.mark.usefixtures("unoptimized")

LEAVES: dict[str, Any] = {
    "float": 0.5,
    "array": np.full((3,), 2.0),
    "matrix": np.ones((8, 6), np.float32),
    "number": np.float32(2),
    "scalar": jnp.float32(3),
    "empty": jnp.zeros((0,)),
    "empty matrix": jnp.zeros((0, 6)),
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: flora(1e-2, ratio=2, weight_decay=0.1, multiply_by_parameter_scale=True),
        lambda: compressed_multi_steps(optax.sgd(0.1), 2, ratio=2),
    ],
    ids=["flora", "compressed_multi_steps"],
)
def test_numbers_and_numpy_arrays_move_as_arrays(make: Any) -> None:
    """Bit for bit as the same numbers in float32 arrays."""
    found = []
    for params in (LEAVES, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), LEAVES)):
        optimizer = make()
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(2):
            updates, state = update(params, state, params)
        found.append((updates, state))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found[0]))


def test_outside_jit_a_number_is_a_leaf_too() -> None:
    optimizer = flora(1e-2)
    updates, _ = optimizer.update(1.0, optimizer.init(2.0), 2.0)
    assert float(updates) == pytest.approx(-1e-3)  # (1 - b1) of the learning rate
    assert flora_report(2.0).state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(optimizer.init(2.0)))


def test_an_accumulator_takes_empty_leaves_and_scalars() -> None:
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), LEAVES)
    loss = lambda params, batch: jnp.mean(batch) * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))  # noqa: E731
    accumulator = sketch_accumulator(jax.random.key(0), 2, state_dtype="float32")
    found = jax.jit(microbatch(jax.grad(loss), 1, 1, accumulator))(params, jnp.array([1.0, 3.0]))
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, np.full(leaf.shape, 2.0)), found)


# --- Scales --------------------------------------------------------------------------------------------------

SHAPE = (12, 20)
_scaling = scale_by_factored_rms_of_matrices()
_scaled = jax.jit(lambda grad: _scaling.update(grad, _scaling.init(grad))[0])
_optimizer = flora(1.0, ratio=4, weight_decay=0.0, clipping_threshold=None)
_course = jax.jit(
    lambda grads: jax.lax.scan(
        lambda state, grad: _optimizer.update(grad, state, jnp.zeros(SHAPE))[::-1],
        _optimizer.init(jnp.zeros(SHAPE)),
        grads,
    )
)


def oracle(grad: np.ndarray) -> np.ndarray:
    """U of the first step in float64."""
    squares = grad.astype(np.float64) ** 2 + 1e-30
    row, col = squares.mean(1, keepdims=True), squares.mean(0, keepdims=True)
    return grad / np.sqrt(row / row.mean()) / np.sqrt(col)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    exponent=st.floats(-45, 38),
    spread=st.floats(0, 30),
    zero_rows=st.sets(st.integers(0, SHAPE[0] - 1)),
    zero_columns=st.sets(st.integers(0, SHAPE[1] - 1)),
)
def test_no_scale_is_a_nan(exponent: float, spread: float, zero_rows: set[int], zero_columns: set[int]) -> None:
    """Zero rows, columns and tensors, denormal numbers and squares beyond float32, from 1e-45 to 1e38.

    Where squares and their sums are float32's normal numbers U is the oracle's: seven roundings of 2**-24 and two
    sums of up to 20 squares, each half of a relative error, stay below 32 * 2**-24.
    """
    generator = np.random.default_rng(int(1e3 * (exponent + 45)))
    rows = 10.0 ** -generator.uniform(0, spread, (SHAPE[0], 1))
    with np.errstate(under="ignore"):
        grad = (generator.choice([-1, 1], SHAPE) * 10.0**exponent * rows).astype(np.float32)
    grad[list(zero_rows)] = 0
    grad[:, list(zero_columns)] = 0
    update = np.asarray(_scaled(jnp.asarray(grad)))
    assert np.isfinite(update).all()
    assert not update[grad == 0].any()
    state, updates = _course(jnp.stack([jnp.asarray(grad), jnp.asarray(grad[::-1]), jnp.zeros(SHAPE)]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, updates)))
    if exponent < 14:  # up to a root mean square of 2**48
        normal = np.abs(grad) >= np.finfo(np.float32).tiny
        np.testing.assert_allclose(update[normal], oracle(grad)[normal], rtol=32 * 2.0**-24)


def test_a_dead_unit_trains_on() -> None:
    """One zero row beside gradients of 1e6: the fault's own case, at its first step."""
    grad = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32).at[3].set(0) * 1e6
    np.testing.assert_allclose(_scaled(grad), oracle(np.asarray(grad)), rtol=32 * 2.0**-24)
