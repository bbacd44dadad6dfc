"""Integration with Lightning's automatic optimization: each window's gradients are kept as sketches."""

import warnings
from typing import Any

from torch import Tensor

from floragrad._extras import require
from floragrad.torch.accumulation import GradientAccumulator
from floragrad.torch.accumulation.remedies import Remedies
from floragrad.torch.distributed.wrapper import Unsynced
from floragrad.torch.integrations import AccumulationOptions, check_owned, checked_options

require("lightning", "lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402
from lightning.pytorch.utilities.model_helpers import is_overridden  # noqa: E402


class _LightningAccumulator(GradientAccumulator):
    remedies = Remedies(
        backward="return the loss from training_step, and Lightning runs its backward pass; for other gradients call "
        "torch.autograd.grad",
        step="Lightning updates them when a window ends",
        clip="set gradient_clip_val, or construct the callback with accumulation={'release': False}",
        drop="Lightning drops the window when the training ends",
        close="let the training that it belongs to end, or call floragrad.GradientAccumulator.close_all(module)",
    )


class FloraAccumulation(Callback):
    """Keeps the gradients of ``accumulate_grad_batches`` micro-batches compressed.

    The module and the Trainer stay as they are: automatic optimization, ``gradient_clip_val``, schedulers, mixed
    precision, checkpoints, which hold the window too. With Flora every tensor is decoded, updated and freed by
    itself, before ``on_before_optimizer_step`` of the module; other optimizers find the sum in ``.grad``. With
    ``accumulate_grad_batches=1`` nothing is changed. Under ``strategy="ddp"`` the processes sum their sketches once in
    a window, and DistributedDataParallel averages nothing; a checkpoint is saved between windows.

    Args:
        accumulation: Options of the windows, as of :class:`floragrad.GradientAccumulator`. Flora under fp16, whose
            scaler Lightning keeps to itself, is used with ``release=False``.

    Attributes:
        grad_norm: Global norm of the last window that was stepped with release, before clipping; else it can be
            taken of ``.grad``, as ever.

    Raises:
        RuntimeError: At the start of the training: parameters that are sharded over processes, manual
            optimization, or with release code that reads ``.grad``.
        TypeError: ``accumulation`` is no dictionary.
        ValueError: There is no such option; after a backward pass, a parameter has a gradient and no optimizer.

    Example:
        >>> import torch
        >>> from floragrad import Flora
        >>> from lightning.pytorch import Trainer, LightningModule
        >>> class Regression(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(64, 64)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return Flora(self.parameters(), lr=1e-3, rank=8)
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
        >>> callback = FloraAccumulation()
        >>> trainer = Trainer(
        ...     max_epochs=1, accumulate_grad_batches=4, gradient_clip_val=1.0, callbacks=[callback],
        ...     enable_model_summary=False, **quiet,
        ... )
        >>> trainer.fit(Regression(), torch.ones(8, 2, 64))
        >>> trainer.global_step, callback.grad_norm > 0
        (2, tensor(True))
    """

    def __init__(self, accumulation: AccumulationOptions | None = None) -> None:
        self._options = checked_options(accumulation)
        self._window: GradientAccumulator | None = None
        self._last: GradientAccumulator | None = None
        self._saved: dict[str, Any] | None = None
        self._unsynced = Unsynced()
        self._has_warned = False
        self.grad_norm: Tensor | None = None

    @property
    def accumulator(self) -> GradientAccumulator | None:
        """The accumulator, whose ``report()`` says how each gradient is kept; closed once the training is over.

        None before the first window, and while a window is one micro-batch.
        """
        return self._last

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse unsupported strategies and manual optimization."""
        strategy = trainer.strategy
        whole = trainer.world_size == 1 or type(strategy) is DDPStrategy
        if not whole or strategy.handles_gradient_accumulation:
            raise RuntimeError(
                f"FloraAccumulation under {type(strategy).__name__}: sketches are of whole parameters, in windows that "
                "Lightning counts; train with strategy='ddp', with devices=1 and strategy='auto', or without it"
            )
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "FloraAccumulation with automatic_optimization=False: use floragrad.GradientAccumulator in "
                "training_step, its backward(loss) instead of manual_backward(loss)"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, _batch: Any, _batch_idx: int) -> None:
        """Construct the accumulator; a new one where a schedule changed the number of micro-batches."""
        steps = trainer.accumulate_grad_batches
        if steps == (1 if self._window is None else self._window.steps):
            return
        self._detach()
        self.grad_norm = self._last = None
        if steps > 1:
            options = self._options
            if _scaler(trainer) is not None and options.get("release") is None:
                options = {**options, "release": False}
            self._window = self._last = _LightningAccumulator(trainer.optimizers[0], steps, **options)
            if self._window.releases:
                _check_release(trainer, pl_module)
                self._warn_of_readers(pl_module)
            if trainer.strategy.model is not None:
                self._unsynced.hold(trainer.strategy.model, pl_module.parameters())
            if self._saved is not None:
                self._window.load_state_dict(self._saved)

    def on_before_zero_grad(self, _trainer: Trainer, _module: LightningModule, _optimizer: Any) -> None:
        """Drop the partial window of a stopped epoch."""
        if self._window is not None:
            self._window.zero_grad()

    def on_before_backward(self, trainer: Trainer, _module: LightningModule, _loss: Tensor) -> None:
        """Begin a micro-batch, of a loss that Lightning has divided by the number of micro-batches."""
        if self._window is not None:
            self._unsynced.check(_parameters(trainer))
            self._window.begin_micro_batch(weight=1.0, last=not trainer.fit_loop._should_accumulate())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the micro-batch; the last one completes the window."""
        if self._window is not None:
            check_owned(pl_module.named_parameters(), _parameters(trainer))
            self._window.end_micro_batch()

    def on_before_optimizer_step(self, trainer: Trainer, _module: LightningModule, _optimizer: Any) -> None:
        """Clip and update with release; Lightning then finds no gradients."""
        # A training_step that returned None has had no backward pass; then the window ends here.
        if self._window is None or not self._window.flush() or not self._window.releases:
            return
        self.grad_norm = self._window.grad_norm
        if trainer.gradient_clip_val:
            self._window.clip_grad_norm_(trainer.gradient_clip_val)
        self._window.step()

    def on_train_batch_end(
        self, _trainer: Trainer, _module: LightningModule, _outputs: Any, _batch: Any, _batch_idx: int
    ) -> None:
        """Free the window after a step without release, before a checkpoint is saved."""
        if self._window is not None and self._window.complete:
            self._window.zero_grad()

    def on_train_end(self, _trainer: Trainer, _module: LightningModule) -> None:
        """Remove the hooks."""
        self._detach()

    def on_exception(self, _trainer: Trainer, _module: LightningModule, _exception: BaseException) -> None:
        """Drop the window, and remove the hooks."""
        if self._window is not None:
            self._window.zero_grad()
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the window's position and its sketches.

        Raises:
            RuntimeError: Several processes are inside a window.
        """
        window = self._saved if self._window is None else self._window.state_dict()
        if window is not None and window["rank"][1] > 1 and (window["seen"] or window["ended"]):
            raise RuntimeError(
                "a checkpoint inside a window of several processes: each has a part of its own, and Lightning saves "
                "the first one's alone; let every_n_train_steps or the end of an epoch decide when to save"
            )
        return {"window": window}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved window, to be loaded when the training starts."""
        self._saved = state_dict["window"]

    def _warn_of_readers(self, pl_module: LightningModule) -> None:
        """Warn once of a module's hooks that read gradients."""
        readers = [name for name in _READERS if is_overridden(name, pl_module)]
        if readers and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{' and '.join(readers)} of {type(pl_module).__name__} will find no gradient in .grad, nor can they "
                "change one: with Flora gradients are folded and freed as they appear. To drop micro-batches with NaN: "
                "FloraAccumulation({'drop_nonfinite': True}); to log the norm: its grad_norm; to find the window's sum "
                "in .grad when the optimizer steps: FloraAccumulation({'release': False})",
                UserWarning,
                stacklevel=2,
            )

    def _detach(self) -> None:
        """Remove the hooks; a later start resumes the window."""
        if self._window is not None:
            self._saved = self._window.state_dict()
            self._window.zero_grad()
            self._window.close()
            self._window = None
        self._unsynced.release()


_READERS = ("on_after_backward", "on_before_optimizer_step")
"""Hooks of a module that read or change gradients."""


def _parameters(trainer: Trainer) -> list[Tensor]:
    return [param for group in trainer.optimizers[0].param_groups for param in group["params"]]


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _check_release(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse to release where Lightning looks for gradients in ``.grad``.

    Raises:
        RuntimeError: Naming the reader of ``.grad`` and the remedy.
    """
    reasons = {
        "release under fp16, whose scaler unscales .grad": _scaler(trainer) is not None,
        "gradient_clip_algorithm='value'": trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value",
        "a configure_gradient_clipping of your own": is_overridden("configure_gradient_clipping", pl_module),
    }
    for reason, applies in reasons.items():
        if applies:
            raise RuntimeError(
                f"{reason}, of gradients that are kept as sketches: "
                "FloraAccumulation(accumulation={'release': False}) leaves the window's sum in .grad"
            )
