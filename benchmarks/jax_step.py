"""Time one jitted update of Flora on the layer shapes of GPT-2 small, beside optax's optimizers.

    python -m benchmarks.jax_step

All optimizers update parameters of their own with the same gradients, in turns. State and parameters are donated, as in
a training step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from benchmarks.harness import Timed
from floragrad.jax import flora

BASE = "optax.adafactor, momentum 0.9"
KERNELS = {"qkv": (768, 2304), "attention": (768, 768), "up": (768, 3072), "down": (3072, 768)}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    BASE: lambda: optax.adafactor(1e-3, momentum=0.9, multiply_by_parameter_scale=False),
    "optax.adamw": lambda: optax.adamw(1e-3),
    "optax.contrib.galore, rank 128": lambda: optax.contrib.galore(1e-3, rank=128, update_proj_gap=10**6),
    "floragrad.jax.flora, int8, rank 128": lambda: flora(1e-3),
    "floragrad.jax.flora, float32, rank 128": lambda: flora(1e-3, mu_dtype="float32"),
    "floragrad.jax.flora, int4, rank 128": lambda: flora(1e-3, mu_dtype="int4"),
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the kernels and vectors of some of GPT-2 small's layers."""
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for name, shape in KERNELS.items():
            found |= {f"{layer}.{name}": shape, f"{layer}.{name}.bias": shape[-1:]}
        found |= {f"{layer}.{norm}.{part}": (768,) for norm in ("norm1", "norm2") for part in ("scale", "bias")}
    return found


class Subject:
    """One optimizer with its parameters and state, stepped in place."""

    def __init__(self, optimizer: optax.GradientTransformation, params: Any, grads: Any) -> None:
        self.params, self._grads = jax.tree.map(jnp.copy, params), grads
        self.state = jax.jit(optimizer.init)(self.params)

        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._step = jax.jit(step, donate_argnums=(0, 1))

    def step(self) -> None:
        """Update the parameters, and wait for them."""
        self.params, self.state = jax.block_until_ready(self._step(self.params, self.state, self._grads))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2 small's layers (default: 12, all)")
    parser.add_argument("--rounds", type=int, default=25, help="measured updates of each optimizer (default: 25)")
    given = parser.parse_args(arguments)
    generator = np.random.default_rng(0)
    normal = {name: generator.standard_normal(shape, np.float32) for name, shape in shapes(given.layers).items()}
    params, grads = ({name: jnp.asarray(scale * each) for name, each in normal.items()} for scale in (0.02, 1e-3))
    subjects = {name: Subject(make(), params, grads) for name, make in OPTIMIZERS.items()}
    timed = {name: Timed(subject.step) for name, subject in subjects.items()}
    harness.interleave(timed.values(), given.rounds)
    rows = []
    for name, row in timed.items():
        state = sum(leaf.nbytes for leaf in jax.tree.leaves(subjects[name].state))
        ratio = harness.ratio(row.seconds, timed[BASE].seconds)
        rows.append((name, ratio or row.error, harness.milliseconds(row.seconds), f"{state / 1e6:.1f}"))
    page = [
        "# One jitted update on GPT-2 small's layers",
        "",
        f"Medians over {given.rounds} rounds of each round's ratio to {BASE}, with quartiles. Parameters and gradients "
        f"of {given.layers} layers, {sum(each.size for each in normal.values()) / 1e6:.1f}M elements in float32; "
        "GaLore on its ordinary step, without a decomposition.",
        "",
        *harness.table(("optimizer", "ratio (quartiles)", "median, ms", "state, MB"), rows),
        "",
        *harness.environment(("floragrad", "jax", "optax")),
    ]
    harness.publish(given, "jax_step", page)
    print("\n".join(page))


if __name__ == "__main__":
    main()
