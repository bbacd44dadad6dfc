"""Bytes of a compiled JAX training step over micro-batches: exact accumulation next to sketches.

    python -m benchmarks.jax_memory

compiles, and never runs, the training step of a Llama with AdamW and windows of 8 micro-batches: a whole window
in one program (``optax.microbatching`` with ``AccumulationType.MEAN``, next to
:func:`floragrad.jax.sketch_accumulator`), and one micro-batch for each call (``optax.MultiSteps``, next to
:func:`floragrad.jax.compressed_multi_steps`). What the compiler says it will hold is written to
``benchmarks/results/jax_memory.md``.

Held at once are the arguments, the outputs that do not lie in donated arguments, and the temporaries:
argument + output − alias + temp of ``compiled.memory_analysis()``. Parameters and state are donated.
"""

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.microbatching import AccumulationType, microbatch

from floragrad.cli.train.jax.model import Llama, next_token_loss
from floragrad.jax import compressed_multi_steps, sketch_accumulator

Scheduler = Literal["memory", "default"]
Loop = Literal["microbatch", "multi_steps"]

SCHEDULERS: dict[Scheduler, str] = {
    "memory": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "default": "CPU_SCHEDULER_TYPE_DEFAULT",
}
"""In which order a CPU runs what could run at once: for the fewest bytes, as accelerators do, or for more cores."""

MANY = 16
"""So many times the sequences make the larger micro-batches."""


@dataclass(frozen=True)
class Job:
    """A Llama and its micro-batches, of so many sequences of so many tokens each."""

    hidden: int = 512
    layers: int = 3
    vocabulary: int = 2048
    microbatches: int = 8
    sequences: int = 1
    tokens: int = 64


@dataclass(frozen=True)
class Compiled:
    """What the compiler holds at once for one step, in bytes."""

    held: int


def bytes_of(tree: Any) -> int:
    """Of all arrays of a tree, which may be shapes alone."""
    return sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def llama(job: Job) -> tuple[Any, Callable[[Any, Any], jax.Array]]:
    """The shapes of the parameters, and the loss of (parameters, tokens)."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=job.vocabulary,
        hidden_size=job.hidden,
        intermediate_size=job.hidden * 43 // 16,
        num_hidden_layers=job.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    graph, params = nnx.split(nnx.eval_shape(lambda: Llama(config, jnp.float32, nnx.Rngs(0))))
    return nnx.to_pure_dict(params), lambda params, tokens: next_token_loss(nnx.merge(graph, params), tokens)


def window_step(job: Job, optimizer: Any, loss: Callable[..., Any], accumulator: Any) -> Callable[..., Any]:
    """A whole window: gradients of all micro-batches, then one update. ``accumulator`` is of (key, N)."""

    def step(params: Any, state: Any, tokens: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(0), optax.tree.get(state, "count"))
        gradients = microbatch(
            jax.value_and_grad(loss),
            argnums=1,
            microbatch_size=job.sequences,
            accumulator=(AccumulationType.MEAN, accumulator(key, job.microbatches)),
        )
        value, grads = gradients(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def micro_step(optimizer: Any, loss: Callable[..., Any]) -> Callable[..., Any]:
    """One micro-batch of a window; the last one updates."""

    def step(params: Any, state: Any, tokens: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def compiled(step: Callable[..., Any], params: Any, state: Any, tokens: Any, scheduler: Scheduler) -> Compiled:
    """Compile a step and read what it holds."""
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens)
    found = lowered.compile(compiler_options={"xla_cpu_scheduler_type": SCHEDULERS[scheduler]}).memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return Compiled(found.argument_size_in_bytes + outputs + found.temp_size_in_bytes)


def compiled_pair(job: Job, loop: Loop, scheduler: Scheduler) -> tuple[Compiled, Compiled]:
    """Exact accumulation, and sketches."""
    params, loss = llama(job)
    inner = optax.adamw(1e-3)

    def tokens(microbatches: int) -> Any:
        return jax.ShapeDtypeStruct((microbatches * job.sequences, job.tokens), jnp.int32)

    def of(optimizer: Any, step: Callable[..., Any], microbatches: int) -> Compiled:
        return compiled(step, params, jax.eval_shape(optimizer.init, params), tokens(microbatches), scheduler)

    if loop == "microbatch":
        exact = window_step(job, inner, loss, lambda *_: AccumulationType.MEAN)
        ours = window_step(job, inner, loss, sketch_accumulator)
        return of(inner, exact, job.microbatches), of(inner, ours, job.microbatches)
    pair = (wrap(inner, job.microbatches) for wrap in (optax.MultiSteps, compressed_multi_steps))
    first, second = (of(each, micro_step(each, loss), 1) for each in pair)
    return first, second


def predicted_difference(job: Job) -> int:
    """Bytes of the gradient tree less those of its sketches."""
    params, _ = llama(job)
    state = jax.eval_shape(compressed_multi_steps(optax.identity(), job.microbatches).init, params)
    return bytes_of(params) - bytes_of(state.acc_grads)


def table(job: Job) -> str:
    """All pairs, with few tokens in a micro-batch and with many, as Markdown."""
    params, _ = llama(job)
    predicted = predicted_difference(job)
    lines = [
        "# Memory of a compiled JAX step",
        "",
        f"`python -m benchmarks.jax_memory`: a Llama of {bytes_of(params) / 4e6:.1f} million parameters in float32, "
        f"AdamW, windows of {job.microbatches} micro-batches; jax {version('jax')}, optax {version('optax')}, CPU "
        f"({platform.machine()}). The gradient tree takes {bytes_of(params) / 1e6:.1f} MB, which is "
        f"{predicted / 1e6:.1f} MB more than its sketches in int4: the prediction.",
        "",
        "| program | tokens of a micro-batch | scheduled for | exact | sketches | difference | of the prediction |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    loops: dict[Loop, str] = {
        "microbatch": "a window, `optax.microbatching`",
        "multi_steps": "a micro-batch, `MultiSteps`",
    }
    goals: dict[Scheduler, str] = {"memory": "memory", "default": "CPU cores (the default)"}
    for loop, sequences, scheduler in product(loops, (job.sequences, MANY * job.sequences), goals):
        sized = replace(job, sequences=sequences)
        exact, ours = compiled_pair(sized, loop, scheduler)
        difference = exact.held - ours.held
        held = " | ".join(f"{each / 1e6:.1f} MB" for each in (exact.held, ours.held, difference))
        row = f"{loops[loop]} | {sequences} x {job.tokens} | {goals[scheduler]} | {held} | {difference / predicted:.3f}"
        lines.append(f"| {row} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/jax_memory.md"))
    parser.add_argument("--hidden", type=int, default=Job.hidden)
    parser.add_argument("--layers", type=int, default=Job.layers)
    given = vars(parser.parse_args())
    out = given.pop("out")
    text = table(Job(**given))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
