"""The report's bytes are the state's bytes, exactly; its peers' bytes are the peers'."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from floragrad._text import format_bytes
from floragrad.jax import MatrixAxes, flora, flora_report
from tests.jax.cases import as_kernel, kernel_axes, options, tensors
from tests.torch.cases import CASES, Case

REPORTED = (
    "rank",
    "b1",
    "ratio",
    "projection",
    "embedding_momentum",
    "mu_dtype",
    "factored",
    "min_dim_size_to_factor",
    "matrix_axes",
)


MADE = ("vector", "wide", "adaptive-experts", "gaussian", "vocabulary-compressed")


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_predicted_bytes_are_actual_bytes(case: Case, mu_dtype: str) -> None:
    """Of float32 and of bfloat16 parameters, and from their shapes alone.

    Few states are made of arrays, for XLA compiles every operation of them; the others are shapes.
    """
    given = options(case, state_dtype=mu_dtype) | {"learning_rate": 1e-2, "matrix_axes": kernel_axes(case.shape)}
    param = jnp.asarray(as_kernel(tensors(case, 1)[0]))
    abstract = jax.ShapeDtypeStruct(param.shape, param.dtype)
    predicted = flora_report(abstract, **{name: given[name] for name in REPORTED if name in given})
    init = flora(**given).init
    made = init(param) if mu_dtype == "int4" and case.name in MADE else jax.eval_shape(init, param)
    assert bytes_of(made) == predicted.state_bytes
    assert bytes_of(jax.eval_shape(init, param.astype(jnp.bfloat16))) == predicted.state_bytes
    assert predicted == flora_report(param, **{name: given[name] for name in REPORTED if name in given})


@pytest.mark.parametrize("least", [1, 30, 50])
def test_bytes_where_short_sides_are_not_factored(least: int) -> None:
    params = {"stack": jnp.zeros((3, 40, 48)), "matrix": jnp.zeros((32, 64)), "vector": jnp.zeros(7)}
    state = flora(1e-2, rank=8, min_dim_size_to_factor=least).init(params)
    assert bytes_of(state) == flora_report(params, rank=8, min_dim_size_to_factor=least).state_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (7,), (24, 40), (200, 300), (3, 3, 16, 16), (3, 160, 400)], ids=str)
def test_peers_bytes_are_the_peers(shape: tuple[int, ...], dtype: Any) -> None:
    """For one parameter; of many, each has a count of its own in the report, 4 bytes, and all share it in optax."""
    param = jnp.ones(shape, dtype)
    report = flora_report(param)
    assert report.adamw_bytes == bytes_of(optax.adamw(1e-3).init(param))
    assert report.adafactor_bytes == bytes_of(optax.adafactor(1e-3, momentum=0.9).init(param))


def test_the_table() -> None:
    params = {
        "embed": {"embedding": jax.ShapeDtypeStruct((10000, 64), jnp.float32)},
        "layers": [
            {
                "kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32),
                "query": jax.ShapeDtypeStruct((64, 4, 16), jnp.float32),
                "small": jax.ShapeDtypeStruct((10, 12), jnp.float32),
                "bias": jax.ShapeDtypeStruct((64,), jnp.float32),
            }
        ],
        "scales": jax.ShapeDtypeStruct((12, 64), jnp.float32),
    }
    hook = {
        "embed": None,
        "layers": [{"kernel": None, "query": MatrixAxes(0, (1, 2)), "small": None, "bias": None}],
        "scales": MatrixAxes((), ()),
    }
    report = flora_report(params, rank=16, matrix_axes=hook)
    lines = str(report).splitlines()
    assert lines[0].split() == ["parameter", "shape", "view", "ρ", "state", "kept"]
    cells = {line.split()[0]: line for line in lines[2:8]}
    assert cells["embed/embedding"].endswith("vocabulary-like, aspect 156 >= 8 and 10000 > 8192: no momentum")
    assert "10000 x 64" in cells["embed/embedding"]
    assert cells["layers/0/kernel"].split()[1:] == ["64x64", "64", "x", "64", "4", "1.8", "kB", "sketch"]
    assert cells["layers/0/query"].split()[1:] == ["64x4x16", "64", "x", "64", "4", "1.8", "kB", "sketch"]
    assert cells["layers/0/small"].endswith("rank 16 > 10 // 2: every column kept")
    assert cells["layers/0/bias"].endswith("vector: kept whole, in float32")
    assert cells["scales"].endswith("vector: kept whole, in float32")
    assert lines[-3].startswith("2 of 6 tensors keep a sketch")
    assert f"AdamW: {format_bytes(report.adamw_bytes)}" in lines[-2]


def test_a_lone_array_has_a_name() -> None:
    assert [row.name for row in flora_report(jnp.zeros((64, 64))).rows] == ["parameter"]


def test_masked_leaves_count_nothing() -> None:
    """The report of the trained part is the state of ``optax.masked``, which keeps none of the rest."""
    params = {"adapter": jnp.zeros((64, 96)), "base": jnp.zeros((128, 128))}
    state = optax.masked(flora(1e-3, rank=8), {"adapter": True, "base": False}).init(params)
    for rest in (optax.MaskedNode(), None):
        report = flora_report({"adapter": params["adapter"], "base": rest}, rank=8)
        assert [row.name for row in report.rows] == ["adapter"]
        assert report.state_bytes == bytes_of(state)


@pytest.mark.parametrize(
    ("shapes", "given", "warns"),
    [
        ([(64, 64)], {}, True),
        ([(64, 64)], {"rank": 16}, False),
        ([(64, 64)], {"rank": None, "ratio": 1}, False),
        ([(64, 64)], {"b1": None}, False),
        ([(64, 64), (512, 512)], {}, False),
        ([(20_000, 64)], {}, False),
    ],
    ids=["rank as large", "smaller rank", "ratio 1", "no momentum", "mostly sketches", "an embedding"],
)
def test_a_warning_where_little_is_compressed(
    shapes: list[tuple[int, ...]], given: dict[str, Any], warns: bool
) -> None:
    params = {str(shape): jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = flora_report(params, **given)
    assert bool(caught) == warns
    assert not caught or "a smaller rank compresses more" in str(caught[0].message)
    assert "<table>" in report._repr_html_()
