"""Train a network of flax linen: Flora in a ``TrainState``.

Shows ``TrainState.create(tx=flora(...))`` with a schedule, and ``MatrixAxes``, which makes one matrix of a
convolution's kernel (width, in, out), as in PyTorch; by default it is one matrix for each of its taps.

Needs ``floragrad[jax]`` and ``flax``. The text is the source of Python's standard library, as bytes.
"""

import argparse
import sysconfig
from pathlib import Path

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from floragrad.jax import MatrixAxes, flora, flora_report

LENGTH, BATCH = 32, 64


class NextByte(nn.Module):
    """Predict a byte from the ones before it, by convolutions."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits of the byte after some tokens, (batch, length)."""
        hidden = nn.Embed(256, 64)(tokens)
        for features in (128, 256):
            hidden = nn.gelu(nn.Conv(features, kernel_size=(4,), strides=2)(hidden))
        hidden = nn.gelu(nn.Dense(512)(hidden.reshape(len(hidden), -1)))
        return nn.Dense(256)(hidden)


def axes(params: dict) -> dict:
    """Name the axes of convolutions; None is the default."""
    return jax.tree.map(lambda leaf: MatrixAxes((0, 1), 2) if leaf.ndim == 3 else None, params)


@jax.jit
def train_step(state: TrainState, pieces: jax.Array) -> tuple[TrainState, jax.Array]:
    """Return the state after an update, and the loss of the last byte of each piece, (batch, length + 1)."""

    def loss(params: dict) -> jax.Array:
        logits = state.apply_fn(params, pieces[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, pieces[:, -1]).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


def main(steps: int) -> None:
    """Train for a number of updates."""
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    data, random = np.frombuffer(text, np.uint8), np.random.default_rng(0)
    model = NextByte()
    params = model.init(jax.random.key(0), np.zeros((1, LENGTH), np.uint8))
    print(flora_report(params, rank=16, matrix_axes=axes))

    schedule = optax.cosine_decay_schedule(1e-3, steps)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=flora(schedule, rank=16, matrix_axes=axes))
    for step in range(1, steps + 1):
        pieces = data[random.integers(len(data) - LENGTH, size=(BATCH, 1)) + np.arange(LENGTH + 1)]
        state, value = train_step(state, pieces)
        if step == 1 or step % 10 == 0 or step == steps:
            print(f"step {step}: loss {value:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
