"""Train a network of Equinox: Flora on the arrays of a module.

Shows ``equinox_axes``: layers of Equinox keep their kernels as (out, in), attention and convolutions included.

Needs ``floragrad[jax]`` and ``equinox``. The text is the source of Python's standard library, as bytes.
"""

import argparse
import sysconfig
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax

from floragrad.jax import equinox_axes, flora, flora_report

LENGTH, BATCH = 32, 64


class NextByte(eqx.Module):
    """Predict a byte from the ones before it."""

    embedding: eqx.nn.Embedding
    layers: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        first, second = jax.random.split(key)
        self.embedding = eqx.nn.Embedding(256, 32, key=first)
        self.layers = eqx.nn.MLP(LENGTH * 32, 256, 512, depth=2, activation=jax.nn.gelu, key=second)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits of the byte after some tokens, (length,)."""
        return self.layers(jax.vmap(self.embedding)(tokens).reshape(-1))


def loss(model: NextByte, pieces: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of the last byte of each piece, (batch, length + 1)."""
    logits = jax.vmap(model)(pieces[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, pieces[:, -1]).mean()


def main(steps: int) -> None:
    """Train for a number of updates."""
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    data, random = np.frombuffer(text, np.uint8), np.random.default_rng(0)
    model = NextByte(jax.random.key(0))
    arrays = eqx.filter(model, eqx.is_array)
    print(flora_report(arrays, rank=32, matrix_axes=equinox_axes))
    optimizer = flora(1e-3, rank=32, matrix_axes=equinox_axes)
    state = optimizer.init(arrays)

    @eqx.filter_jit
    def train_step(model: NextByte, state: optax.OptState, pieces: jax.Array) -> tuple:
        value, grads = eqx.filter_value_and_grad(loss)(model, pieces)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, value

    for step in range(1, steps + 1):
        pieces = data[random.integers(len(data) - LENGTH, size=(BATCH, 1)) + np.arange(LENGTH + 1)]
        model, state, value = train_step(model, state, pieces)
        if step == 1 or step % 10 == 0 or step == steps:
            print(f"step {step}: loss {value:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
