"""The PyTorch backend: transformers' Trainer, fed and watched by us."""

from typing import Any, cast

import torch
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator, set_seed

from floragrad import Flora
from floragrad.torch.integrations import AccumulationOptions
from floragrad.torch.integrations.transformers import FloraTrainerMixin
from floragrad.train.callbacks import RecorderCallback, ScheduleCallback
from floragrad.train.config import RunConfig
from floragrad.train.corpus import Blocks, Corpus
from floragrad.train.environment import Gpu, configure_torch, torch_gpu
from floragrad.train.folder import RunFolder
from floragrad.train.models import build_model, rebuild_model
from floragrad.train.opening import opening
from floragrad.train.optimizers import accumulation_bytes, adamw_bytes, gradient_bytes, optimizer_class, state_bytes
from floragrad.train.recorder import Recorder, Schedule


class TrainerEngine:
    """A run with torch and transformers' Trainer; see :class:`floragrad.train.engine.Engine`.

    Args:
        config: Of the run.
        folder: Its folder, with the checkpoint to go on from.
        corpus: Its text.
        step: The step of that checkpoint; 0 begins.
    """

    libraries = ("torch", "transformers", "tokenizers")

    def __init__(self, config: RunConfig, folder: RunFolder, corpus: Corpus, step: int) -> None:
        configure_torch(config.threads)
        set_seed(config.seed)
        self._config, self._folder, self._corpus = config, folder, corpus
        self._checkpoint = folder.checkpoints()[-1][1] if step else None
        self._model = (
            build_model(config, corpus.facts.vocab_size)
            if self._checkpoint is None
            else rebuild_model(config, self._checkpoint)
        )
        self._optimizer: Any = None
        self.accumulation_bytes = 0

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that torch sees."""
        return torch_gpu()

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def run(self, schedule: Schedule, recorder: Recorder) -> int:
        """Let the Trainer train. Returns the steps made."""
        sketched = self._config.accumulator == "flora"
        trainer = (_SketchingTrainer if sketched else _OrderedTrainer)(
            model=self._model,
            args=_arguments(self._config, self._folder, begins=self._checkpoint is None),
            train_dataset=self._corpus.train_blocks(self._config),
            eval_dataset=self._corpus.validation_blocks(self._config),
            data_collator=default_data_collator,
            optimizer_cls_and_kwargs=optimizer_class(self._config, self._model),
            callbacks=[ScheduleCallback(schedule), RecorderCallback(recorder, self._opened)],
            **({"accumulation": _accumulation(self._config)} if sketched else {}),
        )
        trainer.remove_callback(PrinterCallback)
        # All blocks are as long, so the mean over batches is the mean over tokens. The Trainer's own count of tokens
        # depends on its version: some count the first one of a block too, which nothing predicts.
        trainer.model_accepts_loss_kwargs = False
        trainer.train(resume_from_checkpoint=None if self._checkpoint is None else str(self._checkpoint))
        return int(trainer.state.global_step)

    def _opened(self, optimizer: Any) -> str:
        """What to say of the optimizer that the Trainer has prepared."""
        self._optimizer = optimizer.optimizer
        self.accumulation_bytes = accumulation_bytes(self._config, optimizer)
        report = self._optimizer.report() if isinstance(self._optimizer, Flora) else None
        return opening(self._config, report, self)

    @property
    def optimizer_state_bytes(self) -> int:
        """What the optimizer keeps, measured from its tensors."""
        return state_bytes(self._optimizer)

    @property
    def adamw_state_bytes(self) -> int:
        """What AdamW would keep."""
        return adamw_bytes(self._optimizer)

    @property
    def gradient_bytes(self) -> int:
        """One gradient of every parameter."""
        return gradient_bytes(self._optimizer)


class _OrderedTrainer(Trainer):  # type: ignore[misc]  # transformers carries no types
    """The Trainer, but for its shuffling: the blocks come in their final order."""

    def _get_train_sampler(self, train_dataset: Blocks | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class _SketchingTrainer(FloraTrainerMixin, _OrderedTrainer):
    """The same, with the gradients of a step's micro-batches kept as sketches."""


def _accumulation(config: RunConfig) -> AccumulationOptions:
    """Of the sketches."""
    options = {
        "ratio": config.accumulator_ratio,
        "state_dtype": config.accumulator_dtype,
        "projection": config.accumulator_projection,
        "seed": config.seed,
        "release": config.release,
    }
    return cast(AccumulationOptions, options)


def _arguments(config: RunConfig, folder: RunFolder, begins: bool) -> TrainingArguments:
    """The Trainer's settings. Evaluating, saving and logging are ours."""
    return TrainingArguments(
        output_dir=str(folder.staging),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.micro_batches,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        eval_on_start=begins,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to="none",
    )
