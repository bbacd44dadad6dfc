"""Schedule and recorder of a run in any framework: when to evaluate, save and stop, and the metrics."""

import time
from collections.abc import Mapping, Sequence
from math import exp, isfinite, nan, sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

from floragrad.cli.machine import Gpu, memory_bytes
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.display import Display
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.interrupt import StopRequest
from floragrad.cli.train.processes import ALONE, Processes

LARGEST_EXPONENT = 700.0
BLOCK_DIGITS = 6
"""Decimal places of a block's loss in the metrics."""


def perplexity(loss: float) -> float:
    """Return e to the loss, bounded by the largest float."""
    return exp(min(loss, LARGEST_EXPONENT))


def standard_error(losses: Sequence[float]) -> float | None:
    """Return the standard error of the mean over blocks, s/√n; None of a single one, NaN where a loss is not finite."""
    if len(losses) < 2:
        return None
    return stdev(losses) / sqrt(len(losses)) if all(map(isfinite, losses)) else nan


class Due(NamedTuple):
    """Actions after a step. Saving comes last, so that a resumed run evaluates nothing twice."""

    evaluate: bool
    save: bool
    stop: bool


class Schedule:
    """Decides after each step whether to evaluate, to save, to stop; all processes alike."""

    def __init__(self, config: RunConfig, stop: StopRequest, processes: Processes = ALONE) -> None:
        self._config = config
        self._stop = stop
        self._processes = processes

    def after(self, step: int) -> Due:
        """Return the actions after a step."""
        config, last = self._config, step >= self._config.steps
        # A signal reaches the processes in different steps, or one of them only.
        signum = self._processes.largest(self._stop.signum or 0)
        if signum:
            self._stop.signum = signum
        stop = signum > 0 and not last
        save = (last and config.keep_checkpoint) or step % config.save_every == 0
        return Due(evaluate=last or step % config.eval_every == 0, save=save or stop, stop=stop)


class Recorder:
    """Writes the metrics, publishes the checkpoints, and keeps the display up to date.

    Of several processes all have one, and the leader's alone writes.

    Attributes:
        diverged_at: The step at which the loss was no finite number any more; None otherwise.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        processor: Any,
        display: Display,
        gpu: Gpu | None,
        processes: Processes = ALONE,
    ) -> None:
        self._config = config
        self._processes = processes
        self._folder = folder
        self._processor = processor
        self._display = display
        self._gpu = gpu
        earlier = folder.metrics()
        self._seconds_before = earlier[-1]["seconds"] if earlier else 0.0
        self._began = self._step_began = time.perf_counter()
        self.diverged_at: int | None = None

    @property
    def seconds(self) -> float:
        """Time spent on this run, in all its sessions."""
        return float(self._seconds_before + time.perf_counter() - self._began)

    def begin(self, opening: str, step: int) -> None:
        """Show the optimizer's state, then the progress after ``step``."""
        self._began = time.perf_counter()
        self._display.say(opening)
        self._display.begin(step, self._config.steps, self._config.unit)

    def step_begins(self) -> None:
        """Start the step's clock."""
        self._step_began = time.perf_counter()

    def step(self, step: int, loss: float, rates: Mapping[str, float], grad_norm: float | None) -> dict[str, Any]:
        """Write a training step's line, when its loss has been read and so the step is really over. Returns it.

        Args:
            step: Steps made, this one included.
            loss: The mean over the step's tokens.
            rates: The learning rate of each kind of parameter that there is.
            grad_norm: The gradient's norm before it was clipped.
        """
        step_seconds = time.perf_counter() - self._step_began
        memory = memory_bytes(self._gpu)
        line = self._write(
            step,
            loss=loss,
            lr=rates.get("matrix"),
            embedding_lr=rates.get("vocabulary"),
            grad_norm=grad_norm,
            step_seconds=step_seconds,
            memory_bytes=memory,
        )
        self._display.step(step, loss, self._config.units_per_step / step_seconds, memory)
        self._look_at(step, loss)
        return line

    def evaluation(
        self, step: int, losses: Sequence[float], measures: Mapping[str, float] | None = None
    ) -> dict[str, Any]:
        """Write an evaluation's line, from the loss of each validation block and other measures. Returns it."""
        found = measures or {}
        loss = fmean(losses)
        blocks = [round(each, BLOCK_DIGITS) if isfinite(each) else None for each in losses]
        error = standard_error(losses)
        numbers = {"validation_loss": loss, "perplexity": perplexity(loss), **found}
        line = self._write(step, **numbers, standard_error=error, block_losses=blocks)
        self._display.evaluation(step, loss, perplexity(loss), found)
        self._look_at(step, loss)
        return line

    def saved(self, step: int) -> None:
        """Complete the checkpoint with the data's processor, then publish it when all have written their part."""
        self._processes.wait()
        if self._processes.leads:
            with self._folder.writing():
                self._processor.save_pretrained(self._folder.staging / f"checkpoint-{step}")
            self._folder.publish(step)
        self._processes.wait()

    def _look_at(self, step: int, loss: float) -> None:
        if not isfinite(loss):
            self.diverged_at = step

    def _write(self, step: int, **values: float | list[float | None] | None) -> dict[str, Any]:
        known = {
            name: None if isinstance(value, float) and not isfinite(value) else value for name, value in values.items()
        }
        read = {self._config.unit: step * self._config.units_per_step}
        line = {"step": step, **known, **read, "seconds": self.seconds}
        if self._processes.leads:
            self._folder.append_metrics(line)
        return line
