"""Compare the bytes of a compiled JAX training step over micro-batches: exact accumulation next to sketches.

    python -m benchmarks.jax_memory

Steps of a Llama with AdamW and windows of 8 micro-batches are compiled and not run: a whole window in one program
(``optax.microbatching``, with ``AccumulationType.MEAN`` or :func:`floragrad.jax.sketch_accumulator`), and one
micro-batch per call (``optax.MultiSteps`` or :func:`floragrad.jax.compressed_multi_steps`). Bytes held at once are
argument + output − alias + temp of ``compiled.memory_analysis()``; parameters and state are donated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.microbatching import AccumulationType, microbatch

from benchmarks import harness
from floragrad.cli.train.jax.model import Llama, next_token_loss
from floragrad.jax import compressed_multi_steps, sketch_accumulator

Scheduler = Literal["memory", "default"]
Loop = Literal["microbatch", "multi_steps"]
LOOPS: dict[Loop, str] = {"microbatch": "a window, `optax.microbatching`", "multi_steps": "a micro-batch, `MultiSteps`"}
SCHEDULERS: dict[Scheduler, tuple[str, str]] = {
    "memory": ("CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED", "memory"),
    "default": ("CPU_SCHEDULER_TYPE_DEFAULT", "CPU cores (the default)"),
}
"""Orders of operations that could run at once: for the fewest bytes, as on accelerators, or for more cores."""
MANY = 16
"""Factor of the sequences in the larger micro-batches."""


@dataclass(frozen=True)
class Job:
    """A Llama, and micro-batches of sequences of tokens."""

    hidden: int = 512
    layers: int = 3
    vocabulary: int = 2048
    microbatches: int = 8
    sequences: int = 1
    tokens: int = 64


def bytes_of(tree: Any) -> int:
    """Sum the bytes of all arrays or shapes of a tree."""
    return sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def llama(job: Job) -> tuple[Any, Callable[[Any, Any], jax.Array]]:
    """Return the shapes of the parameters, and the loss of (parameters, tokens)."""
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


def held_bytes(job: Job, optimizer: Any, scheduler: Scheduler, accumulator: Any = None) -> int:
    """Compile a step, and return the bytes that it holds at once.

    Args:
        job: The model and its micro-batches.
        optimizer: Of the step; without an accumulator it gathers the gradients of a window itself.
        scheduler: One of :data:`SCHEDULERS`.
        accumulator: A function of (key, N) that returns the accumulator of a whole window; None: the step takes one
            micro-batch.
    """
    params, loss = llama(job)
    state = jax.eval_shape(optimizer.init, params)
    sequences = job.sequences * (1 if accumulator is None else job.microbatches)

    def step(params: Any, state: Any, tokens: Any) -> Any:
        gradients = jax.value_and_grad(loss)
        if accumulator is not None:
            key = jax.random.fold_in(jax.random.key(0), optax.tree.get(state, "count"))
            chosen = (AccumulationType.MEAN, accumulator(key, job.microbatches))
            gradients = microbatch(gradients, argnums=1, microbatch_size=job.sequences, accumulator=chosen)
        value, grads = gradients(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    tokens = jax.ShapeDtypeStruct((sequences, job.tokens), jnp.int32)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens)
    compiled = lowered.compile(compiler_options={"xla_cpu_scheduler_type": SCHEDULERS[scheduler][0]})
    found = compiled.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.argument_size_in_bytes + outputs + found.temp_size_in_bytes)


def compiled_pair(job: Job, loop: Loop, scheduler: Scheduler) -> tuple[int, int]:
    """Return the bytes held with exact accumulation, and with sketches."""
    inner = optax.adamw(1e-3)
    if loop == "microbatch":
        exact = held_bytes(job, inner, scheduler, lambda *_: AccumulationType.MEAN)
        return exact, held_bytes(job, inner, scheduler, sketch_accumulator)
    exact = held_bytes(job, optax.MultiSteps(inner, job.microbatches), scheduler)
    return exact, held_bytes(job, compressed_multi_steps(inner, job.microbatches), scheduler)


def predicted_difference(job: Job) -> int:
    """Return the bytes of the gradient tree less those of its sketches."""
    params, _ = llama(job)
    state = jax.eval_shape(compressed_multi_steps(optax.identity(), job.microbatches).init, params)
    return bytes_of(params) - bytes_of(state.acc_grads)


def page(job: Job) -> list[str]:
    """Compile all pairs, with few tokens in a micro-batch and with many."""
    params, predicted = bytes_of(llama(job)[0]), predicted_difference(job)
    rows = []
    for loop, sequences, scheduler in product(LOOPS, (job.sequences, MANY * job.sequences), SCHEDULERS):
        exact, ours = compiled_pair(replace(job, sequences=sequences), loop, scheduler)
        held = [f"{each / 1e6:.1f} MB" for each in (exact, ours, exact - ours)]
        share = f"{(exact - ours) / predicted:.3f}"
        rows.append((LOOPS[loop], f"{sequences} x {job.tokens}", SCHEDULERS[scheduler][1], *held, share))
    return [
        "# Memory of a compiled JAX step",
        "",
        f"A Llama of {params / 4e6:.1f}M parameters in float32, AdamW, windows of {job.microbatches} micro-batches. "
        f"The gradient tree takes {params / 1e6:.1f} MB, {predicted / 1e6:.1f} MB more than its sketches in int4: the "
        "prediction.",
        "",
        *harness.table(
            ("program", "micro-batch", "scheduled for", "exact", "sketches", "difference", "of the prediction"), rows
        ),
        "",
        *harness.environment(("floragrad", "jax", "optax")),
    ]


def main(arguments: Sequence[str] | None = None, job: Job = Job()) -> None:
    given = harness.parser(__doc__).parse_args(arguments)
    written = page(job)
    harness.publish(given, "jax_memory", written)
    print("\n".join(written))


if __name__ == "__main__":
    main()
