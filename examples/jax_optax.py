"""Train with JAX: Flora in a chain of optax, with a learning rate that may be changed at any time.

Shows three things that users of optax do: ``optax.chain`` with clipping in front, ``optax.inject_hyperparams`` for a
learning rate in the state, and ``compressed_multi_steps`` in the place of ``optax.MultiSteps``.

Needs ``floragrad[jax]``. The text is the source of Python's standard library, as bytes.
"""

import argparse
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from floragrad.jax import compressed_multi_steps, flora, flora_report

LENGTH, BATCH = 32, 64


def init(key: jax.Array) -> dict[str, jax.Array]:
    """Return the parameters of a network that predicts a byte from the ones before it."""
    shapes = {"embedding": (256, 32), "hidden": (LENGTH * 32, 512), "middle": (512, 512), "out": (512, 256)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(each, shape) / np.sqrt(1 if name == "embedding" else shape[0])
        for each, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def loss(params: dict[str, jax.Array], pieces: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of the last byte of each piece, (batch, length + 1)."""
    hidden = params["embedding"][pieces[:, :-1]].reshape(len(pieces), -1)
    for name in ("hidden", "middle"):
        hidden = jax.nn.gelu(hidden @ params[name])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["out"], pieces[:, -1]).mean()


def main(steps: int) -> None:
    """Train for a number of updates, of two micro-batches each."""
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    data, random = np.frombuffer(text, np.uint8), np.random.default_rng(0)
    params = init(jax.random.key(0))
    print(flora_report(params, rank=32))

    def rule(learning_rate: float) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(1.0), flora(learning_rate, rank=32))

    injected = optax.inject_hyperparams(rule)(learning_rate=1e-3)
    optimizer = compressed_multi_steps(injected, every_k_schedule=2)  # before: optax.MultiSteps(injected, 2)
    state = optimizer.init(params)

    @jax.jit
    def micro_step(params: dict, state: optax.OptState, pieces: jax.Array) -> tuple:
        value, grads = jax.value_and_grad(loss)(params, pieces)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for step in range(1, steps + 1):
        # Any value, at any time, without a recompilation.
        state.inner_opt_state.hyperparams["learning_rate"] = jnp.float32(1e-3 * min(1, 2 * (1 - (step - 1) / steps)))
        for _ in range(2):
            pieces = data[random.integers(len(data) - LENGTH, size=(BATCH, 1)) + np.arange(LENGTH + 1)]
            params, state, value = micro_step(params, state, pieces)
        if step == 1 or step % 10 == 0 or step == steps:
            print(f"step {step}: loss {value:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
