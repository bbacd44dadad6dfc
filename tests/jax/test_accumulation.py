"""sketch_accumulator: optax.microbatching with a sketch for a gradient tree."""

import re
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.microbatching import AccumulationType, micro_grad, microbatch

from floragrad.jax import MatrixAxes, compressed_multi_steps, sketch_accumulator
from floragrad.policy import StateDtype, matrix_view, plan_accumulator
from tests.jax.accumulation_cases import assert_close, assert_equal, tree
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("unoptimized")

BATCH, MICRO = 12, 3


def loss(params: Any, batch: Any) -> Any:
    """Its gradient is the mean over the batch of each example's own numbers times every leaf's."""
    weights = jnp.mean(batch)
    return sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32) * weights)) for leaf in jax.tree.leaves(params))


def windows(accumulator: Any, params: Any, batch: Any) -> Any:
    return jax.jit(microbatch(jax.grad(loss), 1, MICRO, accumulator))(params, batch)


@pytest.mark.parametrize(
    ("averages", "dtype"),
    [
        pytest.param(True, jnp.float32, id="mean-float32"),
        slow(True, jnp.bfloat16, id="mean-bfloat16"),
        slow(False, jnp.float32, id="sum-float32"),
        pytest.param(False, jnp.bfloat16, id="sum-bfloat16"),
    ],
)
def test_every_column_in_float32_is_exact(averages: bool, dtype: Any) -> None:
    """The same as optax's own, but for the order of float32 sums of four; bfloat16 is rounded once, at the end."""
    params, batch = tree(0, dtype), jnp.linspace(-1, 2, BATCH)
    count = BATCH // MICRO if averages else None
    found = windows(sketch_accumulator(jax.random.key(0), count, state_dtype="float32"), params, batch)
    if dtype == jnp.float32:
        exact = windows(AccumulationType.MEAN if averages else AccumulationType.SUM, params, batch)
        assert_close(found, exact, 4 * 2.0**-22)
        return
    wide = jax.tree.map(lambda each: each.astype(jnp.float32), params)
    exact = windows(AccumulationType.MEAN if averages else AccumulationType.SUM, wide, batch)
    # Each of four gradients is bfloat16 itself: half of 2⁻⁷ of the largest, and once more at the end.
    assert_close(found, jax.tree.map(lambda each: each.astype(dtype), exact), 8 * 2.0**-7)


@pytest.mark.parametrize(
    "kind",
    [
        slow(AccumulationType.SUM, id="sum"),
        pytest.param(AccumulationType.MEAN, id="mean"),
    ],
)
def test_micro_grad_over_examples(kind: AccumulationType) -> None:
    """Per-example gradients: the examples of a micro-batch are aggregated first, as optax does."""
    params, batch = tree(0), jnp.linspace(-1, 2, BATCH)
    count = BATCH // MICRO if kind is AccumulationType.MEAN else None
    found = []
    for accumulator in (kind, sketch_accumulator(jax.random.key(0), count, state_dtype="float32")):
        grads, aux = jax.jit(micro_grad(loss, microbatch_size=MICRO, accumulator=accumulator))(params, batch)
        assert aux.values.shape == (BATCH,)
        found.append(grads)
    assert_close(found[1], found[0], BATCH * 2.0**-22)


@pytest.mark.parametrize("state_dtype", ["int4", "int8", "bfloat16", "float32"])
@pytest.mark.parametrize("ratio", [1, 3])
def test_bytes_are_as_planned(state_dtype: StateDtype, ratio: int) -> None:
    """What is carried is the policy's data and scales, and nothing beside them.

    (What else the policy lists is PyTorch's: with it a norm is known before anything is decoded. Here it is
    taken of what was decoded.)
    """
    params = tree(0)
    accumulator = sketch_accumulator(jax.random.key(0), ratio=ratio, state_dtype=state_dtype)
    carried = jax.eval_shape(accumulator.init, params)
    planned = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        # The policy speaks of (outputs, inputs); an embedding has its inputs last already.
        embedding = "embedding" in jax.tree_util.keystr(path)
        shape = leaf.shape if leaf.ndim < 2 or embedding else (*leaf.shape[:-2], leaf.shape[-1], leaf.shape[-2])
        plan = plan_accumulator(shape, ratio=ratio, state_dtype=state_dtype)
        assert matrix_view(shape) is None or plan.ratio == (1 if path[0].key in ("embedding", "head") else ratio)
        planned += sum(buffer.nbytes for name, buffer in plan.buffers.items() if name in ("data", "scale"))
    assert sum(prod(each.shape) * each.dtype.itemsize for each in jax.tree.leaves(carried)) == planned
    state = jax.eval_shape(compressed_multi_steps(optax.sgd(1.0), 2, ratio=ratio, state_dtype=state_dtype).init, params)
    assert sum(prod(each.shape) * each.dtype.itemsize for each in jax.tree.leaves(state.acc_grads)) == planned


def test_every_window_has_numbers_of_its_own_and_no_compilation() -> None:
    """One program serves all keys; the same key gives the same bits, another one others."""
    params, batch = tree(0), jnp.linspace(-1, 2, BATCH)
    traced = []

    @jax.jit
    def window(params: Any, batch: Any, step: Any) -> Any:
        traced.append(step)
        accumulator = sketch_accumulator(jax.random.fold_in(jax.random.key(7), step), 4, ratio=2)
        return microbatch(jax.grad(loss), 1, MICRO, accumulator)(params, batch)

    first, second, again = (window(params, batch, step) for step in (0, 1, 0))
    assert len(traced) == 1
    assert_equal(first, again)
    for name in ("kernel", "embedding"):
        assert (np.asarray(first[name]) != np.asarray(second[name])).mean() > 0.1
    assert_equal(first["bias"], second["bias"])


def test_every_fold_is_rounded_differently() -> None:
    """The same gradient from the same start, in another fold: else the errors of a window would add up."""
    accumulator = sketch_accumulator(jax.random.key(0))
    update = jax.jit(accumulator.update)
    payloads = [
        np.asarray(update(accumulator.init(tree(0)), tree(0), fold).sketches.payload["kernel"]) for fold in (0, 1)
    ]
    assert 0.1 < (payloads[0] != payloads[1]).mean() < 0.9


def test_matrix_axes_choose_the_inputs() -> None:
    """A kernel of (embed, heads, head_dim): its one input axis is sketched, 64 columns as 16 for each output."""
    kernel = {"query": jnp.ones((64, 4, 16))}
    accumulator = sketch_accumulator(
        jax.random.key(0), ratio=4, state_dtype="float32", matrix_axes={"query": MatrixAxes(0, (1, 2))}
    )
    window = accumulator.update(accumulator.init(kernel), kernel, 0)
    assert window.sketches.payload["query"].shape == (16, 64)
    assert accumulator.finalize(window)["query"].shape == (64, 4, 16)


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: sketch_accumulator(jax.random.key(0), **options),
        lambda **options: compressed_multi_steps(optax.sgd(1.0), 2, **options),
    ],
    ids=["accumulator", "multi_steps"],
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0}, "ratio=0: must be an integer >= 1"),
        ({"ratio": None}, "ratio=None: must be an integer >= 1; leave it out to go by rank"),
        ({"ratio": 2, "rank": 8}, "rank=8 and ratio=2: give one of them"),
        ({"rank": True}, "rank=True: must be an integer >= 1"),
        ({"state_dtype": "int2"}, "state_dtype='int2': must be one of"),
        ({"state_dtype": jnp.float16}, "state_dtype='float16': must be one of"),
        ({"projection": "adaptive"}, "projection='adaptive': an adaptive projection is not unbiased"),
        ({"projection": "fourier"}, "projection='fourier': must be one of"),
    ],
    ids=lambda value: None if callable(value) else ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make(**options)
