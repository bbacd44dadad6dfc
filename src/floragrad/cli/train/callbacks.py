"""Callbacks of the Trainer: they ask the schedule and tell the recorder, and others report what it writes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from floragrad.cli.errors import UserError
from floragrad.cli.train.recorder import Recorder, Schedule


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

    def record_step(self, state: TrainerState, control: TrainerControl, logs: Mapping[str, float]) -> dict[str, float]:
        """Record a training step, and stop after one that diverged. Returns its numbers."""
        line = self._recorder.step(state.global_step, logs["loss"], self._rates, logs.get("grad_norm"))
        self._stop_if_diverged(control)
        return _numbers(line)

    def record_evaluation(
        self, state: TrainerState, control: TrainerControl, losses: Sequence[float], measures: Mapping[str, float]
    ) -> dict[str, float]:
        """Record an evaluation, and stop after one that diverged. Returns its numbers by the Trainer's names."""
        line = self._recorder.evaluation(state.global_step, losses, measures)
        self._stop_if_diverged(control)
        return {f"eval_{name.removeprefix('validation_')}": value for name, value in _numbers(line).items()}

    def on_save(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_kwargs: Any) -> None:
        """Complete and publish the checkpoint."""
        self._recorder.saved(state.global_step)

    def _stop_if_diverged(self, control: TrainerControl) -> None:
        """Save nothing of a model that is lost."""
        if self._recorder.diverged_at is not None:
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a line of the metrics that are numbers, without the step."""
    return {name: value for name, value in line.items() if isinstance(value, (int, float)) and name != "step"}


def check_reporters(names: tuple[str, ...]) -> None:
    """Refuse services that the Trainer cannot report to.

    Raises:
        UserError: It does not know one, or its package is missing.
    """
    for name in names if names != ("none",) else ():
        _check_reporter(name)


def _check_reporter(name: str) -> None:
    try:
        (reporter,) = get_reporting_integration_callbacks([name])
        reporter()
    except ValueError as error:
        raise UserError(f"--report-to {name} is unknown: {error}") from error
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--report-to {name} is not installed ({reason}): do so, or leave it out") from error
