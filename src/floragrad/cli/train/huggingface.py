"""Transformers' Trainer with our order of the data, losses, evaluation, schedule and records."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

from floragrad.cli.train.data import Examples
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.processes import Processes
from floragrad.cli.train.recorder import Recorder, Schedule
from floragrad.cli.train.tasks.task import Task
from floragrad.torch.integrations.transformers import FloraTrainerMixin

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
"""Names of the files in the Trainer's checkpoints."""


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Ask the schedule after each step, and tell the recorder what the Trainer does."""

    def __init__(self, schedule: Schedule, recorder: Recorder, opening: Callable[[Any], str]) -> None:
        self._schedule, self._recorder, self._opening = schedule, recorder, opening
        self.rates: dict[str, float] = {}

    def on_train_begin(self, _args: Any, state: TrainerState, _control: Any, **kwargs: Any) -> None:
        """Show the optimizer's report, then the progress."""
        self._recorder.begin(self._opening(kwargs["optimizer"]), state.global_step)

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Start the step's clock."""
        self._recorder.step_begins()

    def on_pre_optimizer_step(self, *_args: Any, **kwargs: Any) -> None:
        """Note the learning rates of this step, before the schedule moves on."""
        self.rates = {group["kind"]: float(group["lr"]) for group in kwargs["optimizer"].param_groups}

    def on_step_end(self, _args: Any, state: TrainerState, control: TrainerControl, **_kwargs: Any) -> None:
        """Evaluate, save and stop as the schedule says. The Trainer saves after it evaluates."""
        due = self._schedule.after(state.global_step)
        control.should_evaluate, control.should_save = due.evaluate, due.save
        control.should_training_stop = control.should_training_stop or due.stop

    def on_save(self, _args: Any, state: TrainerState, _control: Any, **_kwargs: Any) -> None:
        """Complete and publish the checkpoint."""
        self._recorder.saved(state.global_step)


class OrderedTrainer(Trainer):  # type: ignore[misc]  # transformers carries no types
    """The Trainer, but for its shuffling: the blocks come in their final order, each batch divided over processes.

    ``opening`` describes the optimizer before the first step; the other arguments are its own.
    """

    control: Any

    def __init__(
        self,
        folder: RunFolder,
        task: Task,
        processor: Any,
        processes: Processes,
        schedule: Schedule,
        recorder: Recorder,
        opening: Callable[[Any], str],
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        self._folder, self._task, self._processor, self._processes = folder, task, processor, processes
        self._recorder, self._watch = recorder, _Watch(schedule, recorder, opening)
        super().__init__(callbacks=[*callbacks, self._watch], **kwargs)
        self.remove_callback(PrinterCallback)
        # All blocks count alike, so the loss is a mean over batches. The Trainer's own count of tokens
        # depends on its version: some count the first one of a block too, which nothing predicts.
        self.model_accepts_loss_kwargs = False
        # Under the names of its modules: the Trainer finds no others when it loads.
        self.model.save_pretrained = partial(self.model.save_pretrained, save_original_format=False)
        if self.args.world_size != processes.size:
            raise RuntimeError(f"the Trainer trains in {self.args.world_size} of {processes.size} processes")
        if processes.sharded:
            # The model brings its own communication: no DistributedDataParallel around it.
            self.accelerator.prepare_model = _as_it_is

    def _get_train_sampler(self, train_dataset: Examples | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], *_args: Any, **_kwargs: Any) -> Tensor:
        """Return the task's loss."""
        return self._task.loss(model, inputs)

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """Return the loss of each validation block, however they are divided over processes, their mean, and more."""
        self.model.eval()
        count = len(self.eval_dataset)
        found: dict[str, list[float]] = defaultdict(lambda: [0.0] * count)
        for part in _parts(count, self.args.per_device_eval_batch_size, self._processes):
            # Who has nothing left takes part with a block that does not count: shards are gathered from all.
            rows = [self.eval_dataset[position] for position in part or [0]]
            with torch.no_grad():
                measured = self._task.examine(self.model, self._prepare_inputs(self.data_collator(rows)))
            for name, values in measured.items():
                found[name][part.start : part.stop] = values.tolist()[: len(part)]
        blocks = {name: self._processes.total(*values) for name, values in found.items()}
        losses = blocks.pop("loss")
        with torch.no_grad():
            measures = self._task.measure(
                self.model, self._folder.config, self.eval_dataset, self._processor, self._prepare_inputs
            )
        measures = {**{name: fmean(values) for name, values in blocks.items()}, **measures}
        line = self._recorder.evaluation(self.state.global_step, losses, measures)
        metrics = {f"eval_{name.removeprefix('validation_')}": value for name, value in _numbers(line).items()}
        self._report(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *_args: Any, **_kwargs: Any) -> None:
        """Record a step, and report its line of the metrics. The Trainer's own history would grow, and is not kept."""
        if "loss" in logs:
            rates, norm = self._watch.rates, logs.get("grad_norm")
            self._report(_numbers(self._recorder.step(self.state.global_step, logs["loss"], rates, norm)))

    def _report(self, numbers: dict[str, float]) -> None:
        """Show numbers to the callbacks of ``--report-to``, and stop after a loss that diverged, with nothing saved."""
        if self._recorder.diverged_at is not None:
            self.control.should_training_stop = True
            self.control.should_evaluate = self.control.should_save = False
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, numbers)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save, or say in one line why the disk refuses it."""
        with self._folder.writing():
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save whole weights."""
        if self._processes.sharded:
            from floragrad.cli.train.sharding import whole_weights

            state_dict = whole_weights(self.model)
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save a whole state."""
        if not self._processes.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from floragrad.cli.train.sharding import whole_state

        state = whole_state(self.optimizer.optimizer, self._processes)
        if self._processes.leads:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights, but for a model that has been cut: that has them already."""
        if not self._processes.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load a whole state."""
        if not self._processes.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        from floragrad.cli.train.sharding import load_state

        load_state(self.optimizer.optimizer, torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu"))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER))


class SketchingTrainer(FloraTrainerMixin, OrderedTrainer):
    """Trainer that keeps the gradients of a step's micro-batches as sketches."""

    def __init__(self, processes: Processes, **kwargs: Any) -> None:
        super().__init__(processes=processes, **kwargs)
        if processes.size > 1:
            # Sketches are what is summed over the processes: no DistributedDataParallel, which sums gradients.
            self.accelerator.prepare_model = _as_it_is


def _as_it_is(model: Any, **_kwargs: Any) -> Any:
    return model


def _parts(blocks: int, share: int, processes: Processes) -> Iterator[range]:
    """Yield the blocks of each batch that are this process's, as many times on all of them."""
    for first in range(0, blocks, share * processes.size):
        begin = first + share * processes.rank
        yield range(min(begin, blocks), min(begin + share, blocks))


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a line of the metrics that are numbers, without the step."""
    return {name: value for name, value in line.items() if isinstance(value, (int, float)) and name != "step"}
