"""Equal matrices share their code: the program grows by calls of it, not by other kernels. Nothing is timed or run."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from floragrad.jax import flora
from tests.marks import slow

OPTIONS = [
    pytest.param({}, id="int8"),
    slow({"mu_dtype": "int4", "residual": False}, id="int4-paper"),
    pytest.param({"ratio": 1}, id="rounding-alone"),
]


def program(count: int, options: dict[str, Any]) -> Any:
    """The update of so many equal matrices, lowered."""
    optimizer = flora(1e-3, **options)
    params = {f"kernel-{at}": jax.ShapeDtypeStruct((64, 96), jnp.float32) for at in range(count)}
    return jax.jit(optimizer.update).lower(params, jax.eval_shape(optimizer.init, params), params)


def kernels(compiled: str) -> set[str]:
    """What a compiler of fusions compiles: their computations, with names by order of appearance."""
    text = re.sub(r", metadata=\{[^}]*\}|/\*index=\d+\*/", "", compiled)
    bodies = dict(re.findall(r"^%(\S+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))

    def normal(body: str) -> str:
        names: dict[str, str] = {}
        return re.sub(r"%[-.\w]+", lambda found: names.setdefault(found[0], f"%{len(names)}"), body)

    return {normal(bodies[name]) for name in re.findall(r" fusion\(.*?calls=%([-.\w]+)", text)}


@pytest.mark.parametrize("options", OPTIONS)
def test_equal_matrices_share_kernels(options: dict[str, Any]) -> None:
    """One loop draws for all, and what eight have beside four is no kernel of its own.

    Of few sizes, where a pool's shape is in a kernel, each count has its own; so many, not the same ones, are compared.
    """
    few, many = (program(count, options).compile().as_text() for count in (4, 8))
    assert many.count(" while(") == few.count(" while(") == 1
    assert len(kernels(many)) <= len(kernels(few))


def test_equal_matrices_are_traced_once() -> None:
    """Lowered, each matrix more is less than a fifth of the first."""
    one, five = (program(count, {}).as_text().count("\n") for count in (1, 5))
    assert five - one < 4 * one / 5
