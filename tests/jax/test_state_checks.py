"""A state that does not fit its parameters is refused when the update is traced, by the name of the leaf."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from floragrad.jax import compressed_multi_steps, flora, scale_by_flora, sketch_accumulator
from floragrad.jax.second_moment import scale_by_factored_rms_of_matrices

PARAMS = {"block": {"kernel": jnp.ones((64, 128))}, "bias": jnp.ones(8)}
RESIZED = {"block": {"kernel": jnp.ones((64, 192))}, "bias": jnp.ones(8)}
LONGER = {"block": {"kernel": jnp.ones((64, 128))}, "bias": jnp.ones(9)}
REMEDY = "optimizer.init(params) makes a new state"


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def refuses(update: Any, updates: Any, state: Any, message: str) -> None:
    """Nothing is computed: shapes and dtypes are enough."""
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}.*{re.escape(REMEDY)}"):
        jax.eval_shape(update, updates, state)


@pytest.mark.parametrize(
    ("options", "updates", "message"),
    [
        ({}, RESIZED, "the state of block/kernel has mu int8[16, 128], expected int8[16, 192]"),
        ({}, LONGER, "the state of bias has mu float32[8], expected float32[9]"),
        ({"mu_dtype": "int4"}, PARAMS, "the state of block/kernel has mu int8[16, 128], expected uint8[8, 128]"),
        ({"mu_dtype": "float32"}, PARAMS, "the state of block/kernel has mu int8[16, 128], expected float32[16, 128]"),
        ({"ratio": 8}, PARAMS, "the state of block/kernel has mu int8[16, 128], expected int8[8, 128]"),
        (
            {"projection": "adaptive"},
            PARAMS,
            "the state of block/kernel has projection_weight none, expected float32[64]",
        ),
        ({"b1": None}, PARAMS, "the state of bias has mu float32[8], expected none"),
    ],
    ids=["resized", "longer-vector", "int4", "float32", "ratio", "adaptive", "no-momentum"],
)
def test_momentum_of_another_shape_or_storage(options: dict[str, Any], updates: Any, message: str) -> None:
    state = scale_by_flora(ratio=4).init(PARAMS)
    refuses(scale_by_flora(**({"ratio": 4} | options)).update, updates, state, message)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_momentum_that_was_cast(mu_dtype: Any, dtype: Any) -> None:
    """As a tree-wide cast to the parameters' dtype does: int8 payloads in bfloat16 are read as other values."""
    optimizer = scale_by_flora(ratio=4, mu_dtype=mu_dtype)
    state = optimizer.init(PARAMS)
    found = f"{jnp.dtype(dtype)}[8], expected float32[8]"
    refuses(optimizer.update, PARAMS, cast(state, dtype), f"the state of bias has mu {found}")
    only = state._replace(mu=state.mu | {"block": cast(state.mu["block"], dtype)})
    kept = state.mu["block"]["kernel"].dtype
    if kept == dtype:
        jax.eval_shape(optimizer.update, PARAMS, only)
    else:
        refuses(optimizer.update, PARAMS, only, f"the state of block/kernel has mu {jnp.dtype(dtype)}")


def test_a_count_that_was_cast() -> None:
    """In bfloat16 it would stand still at 256."""
    for optimizer in (scale_by_flora(ratio=4), scale_by_factored_rms_of_matrices()):
        state = optimizer.init(PARAMS)
        wrong = state._replace(count=state.count.astype(jnp.bfloat16))
        refuses(optimizer.update, PARAMS, wrong, "the state has count bfloat16[], expected int32[]")


@pytest.mark.parametrize(
    ("updates", "dtype", "message"),
    [
        (RESIZED, jnp.float32, "the state of block/kernel has v_col float32[128], expected float32[192]"),
        (LONGER, jnp.float32, "the state of bias has v float32[8], expected float32[9]"),
        (PARAMS, jnp.bfloat16, "the state of bias has v_row bfloat16[1], expected float32[1]"),
    ],
    ids=["resized", "longer-vector", "cast"],
)
def test_second_moment_of_another_shape_or_dtype(updates: Any, dtype: Any, message: str) -> None:
    optimizer = flora(1e-3, ratio=4)
    state = cast(optimizer.init(PARAMS), dtype) if dtype != jnp.float32 else optimizer.init(PARAMS)
    refuses(lambda updates, state: optimizer.update(updates, state, updates), updates, state, message)


def test_second_moment_that_is_factored_otherwise() -> None:
    state = flora(1e-3, ratio=4, factored=False).init(PARAMS)
    optimizer = flora(1e-3, ratio=4)
    message = "the state of block/kernel has v_row float32[1], expected float32[64]"
    refuses(lambda updates, state: optimizer.update(updates, state, updates), PARAMS, state, message)


@pytest.mark.parametrize(
    ("updates", "dtype", "message"),
    [
        (RESIZED, None, "the state of block/kernel has payload uint8[32, 128], expected uint8[32, 192]"),
        (PARAMS, jnp.bfloat16, "the state of bias has payload bfloat16[8], expected float32[8]"),
    ],
    ids=["resized", "cast"],
)
def test_sketches_of_another_shape_or_dtype(updates: Any, dtype: Any, message: str) -> None:
    optimizer = compressed_multi_steps(optax.sgd(1.0), 2)
    state = optimizer.init(PARAMS)
    state = state._replace(acc_grads=state.acc_grads if dtype is None else cast(state.acc_grads, dtype))
    refuses(optimizer.update, updates, state, message)


def test_a_window_of_another_shape_or_dtype() -> None:
    accumulator = sketch_accumulator(jax.random.key(0))
    window = accumulator.init(PARAMS)
    message = "the state of block/kernel has payload uint8[32, 128], expected uint8[32, 192]"
    refuses(lambda updates, window: accumulator.update(window, updates, 0), RESIZED, window, message)
