"""The JAX backend's training loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from floragrad.cli.machine import Gpu, configure_jax
from floragrad.cli.train.architecture import llama_config
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.corpus import Corpus
from floragrad.cli.train.data import Examples
from floragrad.cli.train.display import opening
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.jax.checkpoint import restore, save
from floragrad.cli.train.jax.model import DTYPES, Llama, abstract_llama, next_token_losses
from floragrad.cli.train.jax.optimizers import GRADIENT_NORM, learning_rates, report, transformation, windowed
from floragrad.cli.train.jax.weights import Params
from floragrad.cli.train.recorder import Recorder, Schedule


class JaxEngine:
    """A run with flax NNX, optax and orbax, from the checkpoint of ``step``, or from new weights at 0."""

    libraries = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers")

    def __init__(self, config: RunConfig, folder: RunFolder, corpus: Corpus, step: int) -> None:
        configure_jax(config.threads)
        self._config, self._folder, self._step = config, folder, step
        self._train_blocks, self._held_out = corpus.train_blocks(config), corpus.validation_blocks(config)
        self._model_config = llama_config(config, corpus.facts.vocab_size)
        self._graph, shapes = abstract_llama(self._model_config, DTYPES[config.dtype])
        self._transformation = windowed(config, transformation(config))
        if step:
            last = folder.checkpoints()[-1][1]
            self._params, self._state = restore(last, shapes, self._transformation.init, config.kappa)
        else:
            drawn = Llama(self._model_config, DTYPES[config.dtype], nnx.Rngs(config.seed))
            self._params = nnx.to_pure_dict(nnx.state(drawn))
            self._state = self._transformation.init(self._params)
        # What was drawn is placed as what orbax restores: a run goes on with the very program that it began with.
        self._params, self._state = jax.device_put((self._params, self._state), jax.devices()[0])
        self._micro_step = jax.jit(self._updated, donate_argnums=(0, 1))
        self._losses = jax.jit(self._losses_of)

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that the run uses; None on a CPU."""
        (device, *_) = jax.devices()
        if device.platform != "gpu":
            return None
        return Gpu(
            device.device_kind,
            lambda: int(device.memory_stats()["bytes_in_use"]),
            lambda: int(device.memory_stats()["peak_bytes_in_use"]),
        )

    @property
    def parameters(self) -> int:
        """Number of elements of all parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._params))

    def sizes(self) -> dict[str, int]:
        """Return the sizes in the summary, measured from the arrays; of AdamW's state, as optax has it."""
        once = self._config.micro_batches == 1
        return {
            "accumulation_bytes": 0 if once else _bytes(self._state.acc_grads),
            "gradient_bytes": _bytes(self._params),
            "optimizer_state_bytes": _bytes(self._state if once else self._state.inner_opt_state),
            "adamw_state_bytes": _bytes(jax.eval_shape(optax.adamw(1.0).init, self._params)),
        }

    def run(self, schedule: Schedule, recorder: Recorder) -> int:
        """Train until the last step, a signal, or a loss that is not finite. Returns the steps made."""
        steps = np.arange(self._config.steps)
        rates = {kind: np.asarray(rate(steps)) for kind, rate in learning_rates(self._config).items()}
        found = report(self._config, self._params) if self._config.optimizer == "flora" else None
        recorder.begin(opening(self._config, found, self.sizes()), self._step)
        if self._step == 0:
            recorder.evaluation(0, self._validate())
        while self._step < self._config.steps and recorder.diverged_at is None:
            recorder.step_begins()
            applied = {str(kind): float(rate[self._step]) for kind, rate in rates.items()}
            loss = self._train_step()
            self._step += 1
            due = schedule.after(self._step)
            recorder.step(self._step, loss, applied, float(optax.tree.get(self._state, GRADIENT_NORM)))
            if due.evaluate and recorder.diverged_at is None:
                recorder.evaluation(self._step, self._validate())
            if due.save and recorder.diverged_at is None:
                written = self._folder.staging / f"checkpoint-{self._step}"
                with self._folder.writing():
                    save(written, self._model_config, self._params, self._state)
                recorder.saved(self._step)
            if due.stop:
                break
        return self._step

    def _train_step(self) -> float:
        """One optimizer step from all its micro-batches. Returns the mean of their losses."""
        losses = []
        for number in range(self._config.micro_batches):
            first = (self._step * self._config.micro_batches + number) * self._config.batch_size
            tokens = _stacked(self._train_blocks, first, self._config.batch_size)
            self._params, self._state, loss = self._micro_step(self._params, self._state, tokens)
            losses.append(loss)
        return float(np.mean(losses))

    def _updated(self, params: Params, state: Any, tokens: jax.Array) -> tuple[Params, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(self._loss_of)(params, tokens)
        updates, state = self._transformation.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    def _loss_of(self, params: Params, tokens: jax.Array) -> jax.Array:
        return jnp.mean(self._losses_of(params, tokens))

    def _losses_of(self, params: Params, tokens: jax.Array) -> jax.Array:
        return next_token_losses(nnx.merge(self._graph, params), tokens, self._config.gradient_checkpointing)

    def _validate(self) -> list[float]:
        """Return the loss of each validation block."""
        losses: list[float] = []
        for first in range(0, len(self._held_out), self._config.batch_size):
            tokens = _stacked(self._held_out, first, min(self._config.batch_size, len(self._held_out) - first))
            losses += self._losses(self._params, tokens).tolist()
        return losses


def _stacked(blocks: Examples, first: int, count: int) -> jax.Array:
    """Return a batch of ``count`` blocks from ``first`` on."""
    rows = [blocks[position]["input_ids"] for position in range(first, first + count)]
    return jnp.asarray(np.stack(rows), jnp.int32)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
