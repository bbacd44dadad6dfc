"""What watches a run: when to evaluate, save and stop, and what is written down."""

import json
import time
from math import exp, isfinite
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from floragrad.train.config import RunConfig
from floragrad.train.display import Display
from floragrad.train.environment import memory_bytes
from floragrad.train.folder import METRICS, RunFolder
from floragrad.train.interrupt import StopRequest
from floragrad.train.opening import accumulation_line, opening_report
from floragrad.train.optimizers import accumulation_bytes, gradient_bytes

LARGEST_EXPONENT = 700.0


def perplexity(loss: float) -> float:
    """E to the loss, bounded by what a float can hold."""
    return exp(min(loss, LARGEST_EXPONENT))


class Schedule(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Decides after each step whether to evaluate, to save, to stop."""

    def __init__(self, config: RunConfig, stop: StopRequest) -> None:
        self._config = config
        self._stop = stop

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Set the Trainer's flags. It saves after it evaluates, so a resumed run does neither twice."""
        step, last = state.global_step, state.global_step >= state.max_steps
        control.should_evaluate = last or step % self._config.eval_every == 0
        control.should_save = (last and self._config.keep_checkpoint) or step % self._config.save_every == 0
        if self._stop.signum is not None and not last:
            control.should_save = control.should_training_stop = True


class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Writes the metrics, publishes the checkpoints, and keeps the display up to date.

    Attributes:
        accumulation_bytes: What the gradients of earlier micro-batches take.
        diverged_at: The step at which the loss was no finite number any more; None otherwise.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, tokenizer: Any, display: Display) -> None:
        self._config = config
        self._folder = folder
        self._tokenizer = tokenizer
        self._display = display
        earlier = folder.metrics()
        self._seconds_before = earlier[-1]["seconds"] if earlier else 0.0
        self._began = self._step_began = time.perf_counter()
        self._rates: dict[str, float] = {}
        self.accumulation_bytes = 0
        self.diverged_at: int | None = None

    @property
    def seconds(self) -> float:
        """Time spent on this run, in all its sessions."""
        return float(self._seconds_before + time.perf_counter() - self._began)

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the optimizer's report, then the progress."""
        self._began = time.perf_counter()
        optimizer = kwargs["optimizer"]
        self.accumulation_bytes = accumulation_bytes(self._config, optimizer)
        self._display.say(opening_report(optimizer.optimizer))
        if self._config.micro_batches > 1:
            exact = gradient_bytes(optimizer)
            self._display.say(accumulation_line(self._config, self.accumulation_bytes, exact))
        self._display.begin(state.global_step, state.max_steps)

    def on_step_begin(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Start the step's clock."""
        self._step_began = time.perf_counter()

    def on_pre_optimizer_step(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rates of this step, before the schedule moves on."""
        self._rates = {group["kind"]: float(group["lr"]) for group in kwargs["optimizer"].param_groups}

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_kwargs: Any,
    ) -> None:
        """Write a training step's line. The Trainer's own history, which would grow, is not kept."""
        state.log_history.clear()
        if logs is None or "loss" not in logs:
            return
        # By now the loss has been read from the device, so that the step is really over.
        step_seconds = time.perf_counter() - self._step_began
        memory = memory_bytes()
        speed = self._config.tokens_per_step / step_seconds
        self._write(
            state.global_step,
            loss=logs["loss"],
            lr=self._rates.get("matrix"),
            embedding_lr=self._rates.get("vocabulary"),
            grad_norm=logs.get("grad_norm"),
            step_seconds=step_seconds,
            memory_bytes=memory,
        )
        self._display.step(state.global_step, logs["loss"], speed, memory)
        if not isfinite(logs["loss"]):
            self._diverged(state, control)

    def on_evaluate(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_kwargs: Any,
    ) -> None:
        """Write an evaluation's line."""
        loss = metrics["eval_loss"]
        self._write(state.global_step, validation_loss=loss, perplexity=perplexity(loss))
        self._display.evaluation(state.global_step, loss, perplexity(loss))
        if not isfinite(loss):
            self._diverged(state, control)

    def on_save(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_kwargs: Any) -> None:
        """Complete the checkpoint with the tokenizer, then put it in its place."""
        self._tokenizer.save_pretrained(self._folder.staging / f"checkpoint-{state.global_step}")
        self._folder.publish(state.global_step)

    def _diverged(self, state: TrainerState, control: TrainerControl) -> None:
        """Stop, and save nothing of a model that is lost."""
        self.diverged_at = state.global_step
        control.should_training_stop = True
        control.should_evaluate = control.should_save = False

    def _write(self, step: int, **values: float | None) -> None:
        known = {name: value if value is None or isfinite(value) else None for name, value in values.items()}
        line = {"step": step, **known, "tokens": step * self._config.tokens_per_step, "seconds": self.seconds}
        with open(self._folder.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
