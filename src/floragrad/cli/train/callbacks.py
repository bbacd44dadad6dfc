"""Callbacks of the Trainer: they ask the schedule and tell the recorder."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from floragrad.cli.train.recorder import Recorder, Schedule

BLOCK_LOSSES, MEASURES = "eval_block_losses", "eval_measures"
"""The keys of the Trainer's metrics that hold the loss of each validation block, and the task's other measures."""


class ScheduleCallback(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Set the Trainer's flags after each step. The Trainer saves after it evaluates."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Evaluate, save and stop as the schedule says."""
        due = self._schedule.after(state.global_step)
        control.should_evaluate, control.should_save = due.evaluate, due.save
        control.should_training_stop = control.should_training_stop or due.stop


class RecorderCallback(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Pass the Trainer's reports on to the recorder.

    Args:
        recorder: To whom.
        opening: Describes the optimizer before the first step.
    """

    def __init__(self, recorder: Recorder, opening: Callable[[Any], str]) -> None:
        self._recorder = recorder
        self._opening = opening
        self._rates: dict[str, float] = {}

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the optimizer's report, then the progress."""
        self._recorder.begin(self._opening(kwargs["optimizer"]), state.global_step)

    def on_step_begin(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Start the step's clock."""
        self._recorder.step_begins()

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
        """Record a training step. The Trainer's own history, which would grow, is not kept."""
        state.log_history.clear()
        if logs is not None and "loss" in logs:
            self._recorder.step(state.global_step, logs["loss"], self._rates, logs.get("grad_norm"))
            self._stop_if_diverged(control)

    def on_evaluate(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **_kwargs: Any,
    ) -> None:
        """Record an evaluation."""
        self._recorder.evaluation(state.global_step, metrics[BLOCK_LOSSES], metrics[MEASURES])
        self._stop_if_diverged(control)

    def on_save(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_kwargs: Any) -> None:
        """Complete and publish the checkpoint."""
        self._recorder.saved(state.global_step)

    def _stop_if_diverged(self, control: TrainerControl) -> None:
        """Save nothing of a model that is lost."""
        if self._recorder.diverged_at is not None:
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False
