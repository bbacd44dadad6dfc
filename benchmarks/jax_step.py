"""Time of one jitted update on the layer shapes of GPT-2 small, side by side with optax's optimizers.

    python -m benchmarks.jax_step --out benchmarks/results/jax_step

Every optimizer updates the same parameters with the same gradients, in turns: each round times each optimizer once,
in a new order, so that whatever else the machine does meets them alike. What is reported are medians over rounds of
each round's ratio to optax's Adafactor with momentum, with the quartiles, and the median milliseconds beside them.
State and parameters are donated, as in a training step.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from floragrad._text import format_table
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
    """The kernels and vectors of so many of GPT-2 small's layers."""
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for name, shape in KERNELS.items():
            found |= {f"{layer}.{name}": shape, f"{layer}.{name}.bias": shape[-1:]}
        found |= {f"{layer}.{norm}.{part}": (768,) for norm in ("norm1", "norm2") for part in ("scale", "bias")}
    return found


class Subject:
    """One optimizer with its parameters and state, stepped in place."""

    def __init__(self, optimizer: optax.GradientTransformation, params: Any) -> None:
        self.params = jax.tree.map(jnp.copy, params)
        self.state = jax.jit(optimizer.init)(self.params)

        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._step = jax.jit(step, donate_argnums=(0, 1))

    def seconds(self, grads: Any) -> float:
        """The time of one step."""
        start = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self._step(self.params, self.state, grads))
        return time.perf_counter() - start

    def state_bytes(self) -> int:
        """The size of all of its state."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))


def measure(layers: int, rounds: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)

    def normal(scale: float) -> dict[str, jax.Array]:
        return {
            name: jnp.asarray(scale * generator.standard_normal(shape, np.float32))
            for name, shape in shapes(layers).items()
        }

    params, grads = normal(0.02), normal(1e-3)
    subjects = {name: Subject(make(), params) for name, make in OPTIMIZERS.items()}
    for subject in subjects.values():
        for _ in range(3):  # compilation, and GaLore's first decomposition
            subject.seconds(grads)
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name in generator.permutation(list(subjects)):
            times[name].append(subjects[name].seconds(grads))
    results = {}
    for name, seconds in times.items():
        ratios = [ours / base for ours, base in zip(seconds, times[BASE], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        results[name] = {
            "median_ms": 1e3 * statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "quartiles": [low, high],
            "state_bytes": subjects[name].state_bytes(),
        }
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "layers": layers,
        "rounds": rounds,
        "versions": {"jax": jax.__version__, "optax": optax.__version__, "python": platform.python_version()},
        "devices": [str(device.device_kind) for device in jax.devices()],
        "cores": os.cpu_count(),
        "results": results,
    }


def rows(measured: dict[str, Any]) -> list[tuple[str, ...]]:
    """The results in words, the header first."""
    found = [("optimizer", "ratio", "quartiles", "median, ms", "state, MB")]
    for name, each in measured["results"].items():
        low, high = each["quartiles"]
        quartiles, state = f"{low:.2f} – {high:.2f}", f"{each['state_bytes'] / 1e6:.1f}"
        found.append((name, f"{each['ratio']:.2f}", quartiles, f"{each['median_ms']:.1f}", state))
    return found


def markdown(measured: dict[str, Any], command: str) -> str:
    """The page of results."""
    header, *body = ("| " + " | ".join(row) + " |" for row in rows(measured))
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    machine = f"{len(measured['devices'])} x {measured['devices'][0]} device, {measured['cores']} cores"
    return "\n".join(
        [
            "# One jitted update on GPT-2 small's layers",
            "",
            f"Medians over {measured['rounds']} rounds of each round's ratio to {BASE}, and their quartiles. "
            f"Parameters and gradients of {measured['layers']} layers, {measured['parameters'] / 1e6:.1f}M numbers in "
            "float32; "
            "GaLore on its ordinary step, without a decomposition.",
            "",
            header,
            "|" + " --- |" * len(rows(measured)[0]),
            *body,
            "",
            f"- `{command}`",
            f"- {machine}; {versions}",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2 small's layers (default: 12, all)")
    parser.add_argument("--rounds", type=int, default=25, help="times that each optimizer is timed (default: 25)")
    parser.add_argument("--out", type=Path, help="write this path with .json and .md")
    given = parser.parse_args()
    measured = measure(given.layers, given.rounds)
    print("\n".join(format_table(rows(measured))))
    if given.out:
        command = f"python -m benchmarks.jax_step --layers {given.layers} --rounds {given.rounds} --out {given.out}"
        given.out.with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        given.out.with_suffix(".md").write_text(markdown(measured, command), encoding="utf-8")


if __name__ == "__main__":
    main()
