"""Integration with Hugging Face's Trainer: its optimizer, and windows whose gradients are kept as sketches."""

from typing import Any

import torch
from torch import nn

from floragrad._extras import require
from floragrad.torch.accumulation import GradientAccumulator
from floragrad.torch.accumulation.remedies import Remedies
from floragrad.torch.groups import param_groups
from floragrad.torch.integrations import AccumulationOptions, checked_options
from floragrad.torch.optimizer import Flora

require("transformers", "transformers")
require("accelerate", "transformers")

from accelerate import Accelerator  # noqa: E402
from transformers import Trainer  # noqa: E402

from floragrad.torch.integrations.accelerate import FloraAccelerator  # noqa: E402
from floragrad.torch.integrations.accelerated_optimizer import (  # noqa: E402
    AcceleratedAccumulator,
    AccumulatingOptimizer,
)


class FloraFactory:
    """Factory of :class:`floragrad.Flora` for ``Trainer(optimizer_cls_and_kwargs=(FloraFactory, {"lr": 1e-3}))``.

    The Trainer (transformers 5.2 or newer) calls it with the model once its adapters are there and it is placed. The
    parameters are grouped by :func:`floragrad.param_groups`: embeddings and output heads may have a rate of their own,
    vectors have no weight decay. The Trainer passes on neither ``learning_rate`` nor ``weight_decay`` of its arguments:
    name them here; its scheduler and ``max_grad_norm`` apply as ever.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(1000, 64), torch.nn.Linear(64, 64))
        >>> optimizer = FloraFactory()(model, lr=1e-3, embedding_lr=1e-2, weight_decay=0.1, rank=8)
        >>> [(group["kind"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [('matrix', 0.001, 0.1), ('vocabulary', 0.01, 0.1), ('vector', 0.001, 0.0)]
    """

    def __call__(
        self,
        model: nn.Module,
        lr: float,
        embedding_lr: float | None = None,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> Flora:
        """Return the optimizer of a model.

        Args:
            model: The model.
            lr: Learning rate.
            embedding_lr: Of embeddings and output heads; None: ``lr``.
            weight_decay: Of everything but vectors.
            **options: Of :class:`floragrad.Flora`.
        """
        return Flora(param_groups(model, lr, embedding_lr, weight_decay), **options)


class _TrainerAccumulator(AcceleratedAccumulator):
    remedies = Remedies(
        backward="call self.accelerator.backward(loss) instead of loss.backward() in training_step, and "
        "torch.autograd.grad in callbacks",
        step="the Trainer steps after the window's last training_step",
        clip="set max_grad_norm, or construct the Trainer with accumulation={'release': False}",
        drop="optimizer.zero_grad() drops the window",
        close=AcceleratedAccumulator.remedies.close,
    )


class _TrainerAccelerator(FloraAccelerator):
    """Accelerator of a Trainer, which counts micro-batches and divides losses itself.

    Attributes:
        trainer_steps: The Trainer's ``gradient_accumulation_steps``.
    """

    accumulator_type = _TrainerAccumulator
    trainer_steps: int

    @property
    def window_steps(self) -> int:
        return self.trainer_steps

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> Any:
        prepared = super().prepare_optimizer(optimizer, device_placement)
        if isinstance(prepared, AccumulatingOptimizer):
            prepared.resumes_windows = False  # a resumed Trainer begins with a window's first micro-batch
        return prepared


class FloraTrainerMixin:
    """Mixin for any ``Trainer`` that keeps the gradients of ``gradient_accumulation_steps`` compressed.

    Name it before the Trainer: ``class FloraSFTTrainer(FloraTrainerMixin, SFTTrainer): pass``. All that
    calls ``accelerator.backward`` keeps working: ``max_grad_norm`` and the logged ``grad_norm``, ``bf16`` and ``fp16``,
    activation checkpointing, losses per token over a whole window, checkpoints. With Flora every tensor is
    decoded, updated and freed by itself when the optimizer steps; other optimizers find the sum in ``.grad``.
    With ``gradient_accumulation_steps=1`` nothing is changed. Several processes sum their sketches once in a window.

    Args:
        *args: Of the Trainer.
        accumulation: Options of the windows, as of :class:`floragrad.GradientAccumulator`.
        optimizer_cls_and_kwargs: As of ``transformers.Trainer``, for Trainers without that argument too (TRL's
            ``DPOTrainer`` and ``GRPOTrainer``); with :class:`FloraFactory`.
        **kwargs: Of the Trainer.

    Raises:
        RuntimeError: The Trainer makes an accelerator of a class of its own, or was given an optimizer twice.
        TypeError: ``accumulation`` is no dictionary.
        ValueError: There is no such option; when training begins, the optimizer lacks trained parameters.
    """

    accelerator: Any
    args: Any
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        accumulation: AccumulationOptions | None = None,
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self._accumulation = checked_options(accumulation)
        super().__init__(*args, **kwargs)
        if optimizer_cls_and_kwargs is not None:
            if self.optimizer is not None:
                raise RuntimeError("optimizers and optimizer_cls_and_kwargs: give one of them")
            self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as the Trainer does, with accumulation."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self._extend_accelerator()

    def _extend_accelerator(self) -> None:
        if type(self.accelerator) is not Accelerator:
            raise RuntimeError(
                f"{type(self).__name__} makes a {type(self.accelerator).__name__}: FloraTrainerMixin extends "
                "accelerate.Accelerator alone; use floragrad.GradientAccumulator in a training_step of your own"
            )
        # The object stays: the Trainer has passed on its methods.
        self.accelerator.__class__ = _TrainerAccelerator
        self.accelerator.set_accumulation_options(self._accumulation)
        self.accelerator.trainer_steps = self.args.gradient_accumulation_steps

    @property
    def accumulator(self) -> GradientAccumulator | None:
        """The accumulator, with a ``report()`` of all sketches; closed once ``train()`` is over.

        None before ``train()``, and with ``gradient_accumulation_steps=1``.
        """
        return next(iter(self.accelerator.accumulators), None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; afterwards remove the hooks."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.accelerator.detach()


def extend_trainer(trainer: Any, accumulation: AccumulationOptions | None = None) -> None:
    """Put :class:`FloraTrainerMixin` in front of the class of a Trainer that was constructed elsewhere.

    Args:
        trainer: The Trainer, before it trains.
        accumulation: Options of the windows, as of :class:`floragrad.GradientAccumulator`.

    Raises:
        RuntimeError: As of the mixin.
    """
    kind = type(trainer)
    trainer.__class__ = type(f"Flora{kind.__name__}", (FloraTrainerMixin, kind), {})
    trainer._accumulation = checked_options(accumulation)
    trainer._extend_accelerator()


class FloraTrainer(FloraTrainerMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` with compressed gradient accumulation; see :class:`FloraTrainerMixin`.

    The optimizer is chosen as in the Trainer, by ``optimizers``, ``optimizer_cls_and_kwargs`` or the arguments.

    Args:
        *args: Of ``transformers.Trainer``.
        accumulation: Options of the windows, as of :class:`floragrad.GradientAccumulator`.
        **kwargs: Of ``transformers.Trainer``.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
        >>> tokens = torch.arange(8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     arguments = TrainingArguments(
        ...         folder, gradient_accumulation_steps=4, per_device_train_batch_size=1, num_train_epochs=1,
        ...         report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no", save_strategy="no",
        ...     )
        ...     trainer = FloraTrainer(
        ...         model, arguments, train_dataset=[{"input_ids": tokens, "labels": tokens}] * 8,
        ...         optimizer_cls_and_kwargs=(FloraFactory, {"lr": 1e-3, "rank": 8}),
        ...     )
        ...     trainer.train().global_step  # doctest: +ELLIPSIS
        {...}
        2
    """
