"""The PyTorch backend: transformers' Trainer, fed and watched by us."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from floragrad import Flora
from floragrad.cli.machine import Gpu, configure_torch, torch_gpu
from floragrad.cli.methods import METHODS
from floragrad.cli.peers import HIDDEN, PEERS
from floragrad.cli.presets import PRESETS
from floragrad.cli.train import adapters
from floragrad.cli.train.callbacks import RecorderCallback, ScheduleCallback, check_reporters
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.models import enable_checkpointing, rebuild_model, trained_model
from floragrad.cli.train.opening import opening
from floragrad.cli.train.optimizers import accumulation_bytes, adamw_bytes, gradient_bytes, optimizer_class, state_bytes
from floragrad.cli.train.processes import Processes
from floragrad.cli.train.recorder import Recorder, Schedule
from floragrad.cli.train.tasks.task import Blocks, Data, Task
from floragrad.torch.integrations import AccumulationOptions
from floragrad.torch.integrations.transformers import FloraTrainerMixin

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
"""Names of the files in the Trainer's checkpoints."""


class TrainerEngine:
    """A run with torch and transformers' Trainer; see :class:`floragrad.cli.train.engine.Engine`.

    Args:
        config: Of the run.
        folder: Its folder, with the checkpoint to go on from.
        task: Makes the model and measures it.
        data: Its data.
        step: The step of that checkpoint; 0 begins.
        processes: Who trains; all make an engine.
    """

    def __init__(
        self, config: RunConfig, folder: RunFolder, task: Task, data: Data, step: int, processes: Processes
    ) -> None:
        configure_torch(config.threads)
        set_seed(config.seed)
        self._config, self._folder, self._task, self._data = config, folder, task, data
        self._step, self._processes = step, processes
        self._checkpoint = folder.checkpoints()[-1][1] if step else None
        self._model = self._sharded_model() if processes.sharded else self._whole_model()
        if config.gradient_checkpointing:
            enable_checkpointing(self._model)
        self._optimizer: Any = None
        self.accumulation_bytes = 0

    def _whole_model(self) -> Any:
        """Return the model at its start, or one that the Trainer will load the checkpoint's weights into."""
        if self._checkpoint is None:
            return self._adapted(self._task.build(self._config, self._data))
        return self._adapted(rebuild_model(self._task.auto_class, self._config, self._checkpoint))

    def _adapted(self, model: Any) -> Any:
        """Return the model, with adapters where the method trains those."""
        config = self._config
        if METHODS[config.optimizer].adapters:
            assert config.rank is not None
            adapters.add_adapters(model, config.rank, others=config.vocabulary == "shared")
        return model

    def _sharded_model(self) -> Any:
        """Return the model with its weights, which cannot be loaded any more once it is cut."""
        from floragrad.cli.train.sharding import shard

        trained, auto_class = self._checkpoint, self._task.auto_class
        model = self._whole_model() if trained is None else trained_model(auto_class, self._config, trained)
        shard(model, self._processes)
        return model

    @property
    def libraries(self) -> Sequence[str]:
        """The distributions whose versions the result depends on."""
        peer = METHODS[self._config.optimizer].peer
        package = PEERS[peer].package if peer else "torch"
        return tuple(dict.fromkeys(("torch", "transformers", "tokenizers", package)))

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that torch sees."""
        return torch_gpu()

    @property
    def parameters(self) -> int:
        """Number of elements of all parameters."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def run(self, schedule: Schedule, recorder: Recorder) -> int:
        """Let the Trainer train. Returns the steps made."""
        check_reporters(self._config.report_to)
        sketched = self._config.accumulator == "flora"
        watch = RecorderCallback(recorder, self._opened)
        trainer = (_SketchingTrainer if sketched else _OrderedTrainer)(
            folder=self._folder,
            task=self._task,
            processor=self._data.processor,
            processes=self._processes,
            watch=watch,
            model=self._model,
            args=_arguments(self._config, self._folder, self._processes, begins=self._checkpoint is None),
            train_dataset=self._data.train_blocks(self._config),
            eval_dataset=self._data.validation_blocks(self._config),
            data_collator=self._task.collate,
            optimizer_cls_and_kwargs=optimizer_class(self._config, self._model),
            callbacks=[ScheduleCallback(schedule), watch],
            **({"accumulation": _accumulation(self._config)} if sketched else {}),
        )
        trainer.remove_callback(PrinterCallback)
        # All blocks count alike, so the loss is a mean over batches. The Trainer's own count of tokens
        # depends on its version: some count the first one of a block too, which nothing predicts.
        trainer.model_accepts_loss_kwargs = False
        if self._processes.size > 1 or self._step:
            # Every process draws numbers of its own; where the checkpoint has some for it, it goes on with those.
            torch.manual_seed(_seed(self._config.seed, self._processes.rank, self._step))
        trainer.train(resume_from_checkpoint=None if self._checkpoint is None else str(self._checkpoint))
        return int(trainer.state.global_step)

    def _opened(self, optimizer: Any) -> str:
        """Describe the optimizer that the Trainer has prepared."""
        self._optimizer = optimizer.optimizer
        self.accumulation_bytes = accumulation_bytes(self._config, optimizer)
        report = self._optimizer.report() if isinstance(self._optimizer, Flora) else None
        return opening(self._config, report, self)

    @property
    def optimizer_state_bytes(self) -> int:
        """Bytes of the optimizer's state, measured from its tensors."""
        return state_bytes(self._optimizer)

    @property
    def hidden(self) -> dict[str, int]:
        """Elements of the hidden matrices, and bytes of their state; adapters count as state."""
        params = [p for group in self._optimizer.param_groups if group["kind"] in HIDDEN for p in group["params"]]
        added = adapters.adapter_parameters(self._model)
        whole = [*adapters.adapted_parameters(self._model), *(param for param in params if param not in added)]
        return {
            "hidden_parameters": sum(param.numel() for param in whole),
            "hidden_state_bytes": state_bytes(self._optimizer, HIDDEN) + sum(param.nbytes for param in added),
        }

    @property
    def adamw_state_bytes(self) -> int:
        """Bytes of AdamW's state."""
        return adamw_bytes(self._optimizer)

    @property
    def gradient_bytes(self) -> int:
        """One gradient of every parameter."""
        return gradient_bytes(self._optimizer)


class _OrderedTrainer(Trainer):  # type: ignore[misc]  # transformers carries no types
    """The Trainer, but for its shuffling: the blocks come in their final order, each batch divided over processes.

    Args:
        folder: Of the run.
        task: Computes the loss.
        processor: Of the data.
        processes: Who trains.
        watch: Records steps and evaluations.
        **kwargs: Of the Trainer.
    """

    control: Any

    def __init__(
        self,
        folder: RunFolder,
        task: Task,
        processor: Any,
        processes: Processes,
        watch: RecorderCallback,
        **kwargs: Any,
    ) -> None:
        self._folder, self._task, self._processor, self._processes = folder, task, processor, processes
        self._watch = watch
        super().__init__(**kwargs)
        for each in self.callback_handler.callbacks:
            if isinstance(each, TensorBoardCallback) and each.logging_dir is None:
                each.logging_dir = str(folder.path / "tensorboard")  # its default is removed with the staging folder
        # Under the names of its modules: the Trainer finds no others when it loads.
        self.model.save_pretrained = partial(self.model.save_pretrained, save_original_format=False)
        if self.args.world_size != processes.size:
            raise RuntimeError(f"the Trainer trains in {self.args.world_size} of {processes.size} processes")
        if processes.sharded:
            # The model brings its own communication: no DistributedDataParallel around it.
            self.accelerator.prepare_model = _as_it_is

    def _get_train_sampler(self, train_dataset: Blocks | None = None) -> SequentialSampler:
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
        metrics = self._watch.record_evaluation(self.state, self.control, losses, measures)
        self._report(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *_args: Any, **_kwargs: Any) -> None:
        """Record a step, and report its line of the metrics. The Trainer's own history would grow, and is not kept."""
        if "loss" in logs:
            self._report(self._watch.record_step(self.state, self.control, logs))

    def _report(self, numbers: dict[str, float]) -> None:
        """Show numbers to the callbacks of ``--report-to``."""
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


class _SketchingTrainer(FloraTrainerMixin, _OrderedTrainer):
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


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _accumulation(config: RunConfig) -> AccumulationOptions:
    """Return the options of the sketches."""
    return cast(AccumulationOptions, {**config.keywords("accumulator"), "release": config.release})


def _arguments(config: RunConfig, folder: RunFolder, processes: Processes, begins: bool) -> TrainingArguments:
    """Return the Trainer's settings. Evaluating, saving and logging are ours."""
    share = config.batch_size // processes.size
    return TrainingArguments(
        output_dir=str(folder.staging),
        max_steps=config.steps,
        per_device_train_batch_size=share,
        per_device_eval_batch_size=share,
        gradient_accumulation_steps=config.micro_batches,
        learning_rate=config.lr,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        eval_on_start=begins,
        save_strategy="no",
        use_cpu=processes.size > 1 and not torch.cuda.is_available(),  # it takes no other for a group of processes
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to=list(config.report_to),
        run_name=folder.path.name,
        # A model by name may leave out parameters in a pass, as mixtures of experts do; our Llamas do not.
        ddp_find_unused_parameters=config.model not in PRESETS,
    )
