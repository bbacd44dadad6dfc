"""The attention of flax linen, flax NNX and Equinox is compressed with the axes that are shipped for each."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from floragrad.jax import equinox_axes, flax_axes, flora, flora_report

WIDTH, HEADS = 48, 4


def views(params: Any, axes: Any) -> dict[str, tuple[int, ...] | None]:
    """How each parameter is seen; every matrix is sketched."""
    report = flora_report(params, ratio=4, matrix_axes=axes)
    assert all(row.momentum == ("whole" if row.view is None else "sketch") for row in report.rows)
    return {row.name: row.view for row in report.rows}


def test_flax_linen() -> None:
    model = nn.MultiHeadDotProductAttention(num_heads=HEADS, qkv_features=2 * WIDTH)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3, WIDTH)))["params"]
    found = views({"layer": params}, flax_axes)
    for name in ("query", "key", "value"):
        assert found[f"layer/{name}/kernel"] == (1, 2 * WIDTH, WIDTH)
        assert found[f"layer/{name}/bias"] is None
    assert found["layer/out/kernel"] == (1, WIDTH, 2 * WIDTH)
    assert found["layer/out/bias"] is None


def test_scanned_layers_of_flax_are_stacks() -> None:
    model = nn.MultiHeadDotProductAttention(num_heads=HEADS)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3, WIDTH)))["params"]
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), params)
    assert views(stacked, flax_axes)["query/kernel"] == (3, WIDTH, WIDTH)
    dense = {name: {"kernel": jnp.zeros((3, WIDTH, 2 * WIDTH))} for name in ("query", "out")}
    assert jax.tree.leaves(flax_axes(dense)) == []


def test_flax_nnx_trains_with_compressed_attention() -> None:
    model = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, flora(1e-2, ratio=4, matrix_axes=flax_axes), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (2, 5, WIDTH))

    @nnx.jit
    def step(model: Any, optimizer: Any) -> jax.Array:
        value, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x) ** 2))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(15)]
    assert losses[-1] < losses[0] / 2
    sketch = [leaf for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.dtype == jnp.int8]
    assert {leaf.shape for leaf in sketch} == {(WIDTH // 4, WIDTH)}
    assert len(sketch) == 4


def test_equinox() -> None:
    def params(key: jax.Array) -> Any:
        attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, use_query_bias=True, key=key)
        modules = {"attention": attention, "conv": eqx.nn.Conv2d(16, 32, 3, key=key)}
        return eqx.filter(modules, eqx.is_inexact_array)

    found = views(jax.eval_shape(params, jax.random.key(0)), equinox_axes)
    assert found["attention/query_proj/weight"] == (1, WIDTH, WIDTH)
    assert found["attention/query_proj/bias"] is None
    assert found["conv/weight"] == (1, 32, 16 * 9)
    assert found["conv/bias"] is None
