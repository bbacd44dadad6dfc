"""The PyTorch backend: transformers' Trainer, fed and watched by us."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from floragrad import Flora
from floragrad.cli.errors import UserError
from floragrad.cli.machine import Gpu, configure_torch, torch_gpu
from floragrad.cli.methods import METHODS
from floragrad.cli.peers import HIDDEN, PEERS
from floragrad.cli.presets import PRESETS
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.data import Data
from floragrad.cli.train.display import opening
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.huggingface import OrderedTrainer, SketchingTrainer
from floragrad.cli.train.models import enable_checkpointing, rebuild_model, trained_model
from floragrad.cli.train.optimizers import (
    accumulation_bytes,
    adamw_bytes,
    adapted_parameters,
    adapter_parameters,
    add_adapters,
    gradient_bytes,
    optimizer_class,
    state_bytes,
)
from floragrad.cli.train.processes import Processes
from floragrad.cli.train.recorder import Recorder, Schedule
from floragrad.cli.train.tasks.task import Task


class TrainerEngine:
    """A run with torch and transformers' Trainer, from the checkpoint of ``step``, or from new weights at 0.

    Of several processes all make an engine.
    """

    def __init__(
        self, config: RunConfig, folder: RunFolder, task: Task, data: Data, step: int, processes: Processes
    ) -> None:
        configure_torch(config.threads)
        set_seed(config.seed)
        self._config, self._folder, self._task, self._data = config, folder, task, data
        self._step, self._processes = step, processes
        self._checkpoint = folder.checkpoints()[-1][1] if step else None
        self._model = self._built()
        self._optimizer: Any = None
        self._accumulation_bytes = 0

    def _built(self) -> Any:
        """Return the model at its start, or one that the Trainer loads the checkpoint's weights into."""
        config, trained, auto_class = self._config, self._checkpoint, self._task.auto_class
        if trained is None:
            model = self._task.build(config, self._data)
        elif self._processes.sharded:  # once it is cut, weights cannot be loaded any more
            model = trained_model(auto_class, config, trained)
        else:
            model = rebuild_model(auto_class, config, trained)
        if METHODS[config.optimizer].adapters:
            assert config.rank is not None
            add_adapters(model, config.rank, others=config.vocabulary == "shared")
        if self._processes.sharded:
            from floragrad.cli.train.sharding import shard

            shard(model, self._processes)
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        return model

    @property
    def libraries(self) -> Sequence[str]:
        """The distributions whose versions the result depends on."""
        peer = METHODS[self._config.optimizer].peer
        package = PEERS[peer].package if peer else "torch"
        return tuple(dict.fromkeys(("torch", "transformers", "tokenizers", package)))

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that the run uses; None on a CPU."""
        return torch_gpu()

    @property
    def parameters(self) -> int:
        """Number of elements of all parameters."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def run(self, schedule: Schedule, recorder: Recorder) -> int:
        """Train until the last step, a signal, or a loss that is not finite. Returns the steps made."""
        config, sketched = self._config, self._config.accumulator == "flora"
        trainer = (SketchingTrainer if sketched else OrderedTrainer)(
            folder=self._folder,
            task=self._task,
            processor=self._data.processor,
            processes=self._processes,
            schedule=schedule,
            recorder=recorder,
            opening=self._opened,
            model=self._model,
            args=_arguments(config, self._folder, self._processes, begins=self._checkpoint is None),
            train_dataset=self._data.train_blocks(config),
            eval_dataset=self._data.validation_blocks(config),
            data_collator=self._task.collate,
            optimizer_cls_and_kwargs=optimizer_class(config, self._model),
            callbacks=reporters(config.report_to, self._folder.path),
            **({"accumulation": {**config.keywords("accumulator"), "release": config.release}} if sketched else {}),
        )
        if self._processes.size > 1 or self._step:
            # Every process draws numbers of its own; where the checkpoint has some for it, it goes on with those.
            torch.manual_seed(_seed(config.seed, self._processes.rank, self._step))
        trainer.train(resume_from_checkpoint=None if self._checkpoint is None else str(self._checkpoint))
        return int(trainer.state.global_step)

    def _opened(self, optimizer: Any) -> str:
        """Describe the optimizer that the Trainer has prepared."""
        self._optimizer = optimizer.optimizer
        self._accumulation_bytes = accumulation_bytes(self._config, optimizer)
        report = self._optimizer.report() if isinstance(self._optimizer, Flora) else None
        return opening(self._config, report, self.sizes())

    def sizes(self) -> dict[str, int]:
        """Return the sizes in the summary, measured in this process; adapters count as state of hidden matrices."""
        groups = [group for group in self._optimizer.param_groups if group["kind"] in HIDDEN]
        added = adapter_parameters(self._model)
        hidden = [param for group in groups for param in group["params"] if param not in added]
        whole = [*adapted_parameters(self._model), *hidden]
        return {
            "accumulation_bytes": self._accumulation_bytes,
            "gradient_bytes": gradient_bytes(self._optimizer),
            "optimizer_state_bytes": state_bytes(self._optimizer),
            "hidden_parameters": sum(param.numel() for param in whole),
            "hidden_state_bytes": state_bytes(self._optimizer, HIDDEN) + sum(param.nbytes for param in added),
            "adamw_state_bytes": adamw_bytes(self._optimizer),
        }


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def reporters(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """Return the Trainer's callbacks of ``--report-to``; refuse one that it does not know, or that is not installed."""
    found = []
    for name in names if names != ("none",) else ():
        try:
            (kind,) = get_reporting_integration_callbacks([name])
            found.append(kind())
        except ValueError as error:
            raise UserError(f"--report-to {name} is unknown: {error}") from error
        except (ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--report-to {name} is not installed ({reason}): do so, or leave it out") from error
        if isinstance(found[-1], TensorBoardCallback) and found[-1].logging_dir is None:
            found[-1].logging_dir = str(folder / "tensorboard")  # its default is removed with the staging folder
    return found


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
        log_level_replica="passive",  # by default a replica shows the warnings that the first process does not
        remove_unused_columns=False,
        report_to="none",  # :func:`reporters` makes them
        run_name=folder.path.name,
        # A model by name may leave out parameters in a pass, as mixtures of experts do; our Llamas do not.
        ddp_find_unused_parameters=config.model not in PRESETS,
    )
