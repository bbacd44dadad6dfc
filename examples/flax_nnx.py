"""Train a transformer of flax NNX: Flora inside ``nnx.Optimizer``.

Shows ``flax_axes``, which names the inputs and outputs of attention's kernels, (embed, heads, head_dim).

Needs ``floragrad[jax]`` and ``flax``. The text is the source of Python's standard library, as bytes.
"""

import argparse
import sysconfig
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from floragrad.jax import flax_axes, flora, flora_report

LENGTH, BATCH, WIDTH = 64, 16, 128


class Block(nnx.Module):
    """A block of a decoder."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Return the hidden states after the block."""
        mask = nnx.make_causal_mask(hidden[..., 0])
        hidden = hidden + self.attention(self.norms[0](hidden), mask=mask)
        return hidden + self.down(nnx.gelu(self.up(self.norms[1](hidden))))


class Decoder(nnx.Module):
    """A small decoder over the 256 bytes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding, self.position = nnx.Embed(256, WIDTH, rngs=rngs), nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks, self.head = nnx.List([Block(rngs) for _ in range(2)]), nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits of the next byte at each position."""
        hidden = self.embedding(tokens) + self.position(np.arange(LENGTH))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


@nnx.jit
def train_step(model: Decoder, optimizer: nnx.Optimizer, pieces: jax.Array) -> jax.Array:
    """Update the model in place; return the loss."""

    def loss(model: Decoder) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(pieces[:, :-1]), pieces[:, 1:]).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def main(steps: int) -> None:
    """Train for a number of updates."""
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    data, random, model = np.frombuffer(text, np.uint8), np.random.default_rng(0), Decoder(nnx.Rngs(0))
    print(flora_report(nnx.state(model, nnx.Param), rank=16, matrix_axes=flax_axes))
    optimizer = nnx.Optimizer(model, flora(1e-3, rank=16, matrix_axes=flax_axes), wrt=nnx.Param)
    for step in range(1, steps + 1):
        pieces = data[random.integers(len(data) - LENGTH, size=(BATCH, 1)) + np.arange(LENGTH + 1)]
        value = train_step(model, optimizer, pieces)
        if step == 1 or step % 10 == 0 or step == steps:
            print(f"step {step}: loss {value:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
