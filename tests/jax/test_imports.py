"""The JAX half without PyTorch, and without JAX."""

import ast
from pathlib import Path

import pytest

import floragrad.jax
from tests.test_imports import run


def test_it_trains_where_torch_is_not_installed() -> None:
    """A line is fitted to a hundredth of where it starts, in an interpreter that cannot find torch.

    Nothing of the training command is loaded either.
    """
    code = """
    import jax
    import jax.numpy as jnp
    import optax
    from floragrad.jax import flora

    x = jax.random.normal(jax.random.key(0), (64, 16))
    y = x @ jax.random.normal(jax.random.key(1), (16, 8))
    loss = lambda w: jnp.mean((x @ w - y) ** 2)
    optimizer = flora(optax.cosine_decay_schedule(0.1, 100), ratio=4)
    w = jnp.zeros((16, 8))
    state, start = optimizer.init(w), loss(w)

    @jax.jit
    def step(w, state):
        updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        return optax.apply_updates(w, updates), state

    for _ in range(100):
        w, state = step(w, state)
    assert loss(w) < 0.01 * start, (loss(w), start)
    import sys
    print(" ".join({name.partition(".")[0] for name in sys.modules}))
    """
    loaded = set(run(code, blocked=("torch",)).split())
    assert {"jax", "optax"} <= loaded
    assert not loaded & {"torch", "transformers", "flax", "orbax"}


@pytest.mark.parametrize("missing", ["jax", "optax"])
def test_what_is_missing_is_named_with_its_extra(missing: str) -> None:
    code = """
    try:
        import floragrad.jax
    except ImportError as error:
        print(error)
    """
    message = f"{missing} is not installed, and this part of floragrad needs it: pip install 'floragrad[jax]'"
    assert run(code, blocked=(missing,)) == message


def test_public_names_are_there() -> None:
    names = {"MatrixAxes", "ScaleByFloraState", "flora", "flora_report", "scale_by_flora"}
    assert names | {"compressed_multi_steps", "sketch_accumulator"} <= set(floragrad.jax.__all__)
    assert all(getattr(floragrad.jax, name) is not None for name in floragrad.jax.__all__)


def test_it_imports_neither_the_torch_half_nor_private_parts_of_optax() -> None:
    for source in Path(floragrad.jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert not module.startswith(("torch", "floragrad.torch", "floragrad.cli"))
                assert "._src" not in module, f"{source.name} imports {module}"
