"""Integration with Accelerate: each window's gradients are kept as sketches."""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from floragrad._extras import require
from floragrad.torch.accumulation import GradientAccumulator
from floragrad.torch.distributed.wrapper import Unsynced
from floragrad.torch.integrations import AccumulationOptions, check_owned, checked_options

require("accelerate", "accelerate")

from accelerate import Accelerator, DistributedType  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402

from floragrad.torch.integrations.accelerated_optimizer import (  # noqa: E402
    AcceleratedAccumulator,
    AccumulatingOptimizer,
)

_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Types where every process has the whole model."""


class FloraAccelerator(Accelerator):  # type: ignore[misc]
    """``accelerate.Accelerator`` that keeps the gradients of ``gradient_accumulation_steps`` micro-batches compressed.

    The loop stays as it is: ``accumulate``, ``backward``, ``clip_grad_norm_``, ``optimizer.step()``, schedulers,
    mixed precision, ``save_state`` and ``load_state``, in the middle of a window too. With Flora every tensor is
    decoded, updated and freed by itself when the optimizer steps; other optimizers find the sum in ``.grad``.
    With ``gradient_accumulation_steps=1`` it is an ``Accelerator`` and nothing else.

    Under several processes DistributedDataParallel averages no gradients (it stays in the state of its
    ``no_sync()``): the sketches are summed over the processes, once in a window. FSDP2 sums shards of gradients in
    every micro-batch, and they are folded where they are. A state is saved between windows.

    Args:
        accumulation_compression_rank: r; ρ = min(m, n) // r columns of a matrix share one element. None keeps
            every column, in four bits: an eighth of float32 gradients, and it trains like exact accumulation.
        *args: Of ``accelerate.Accelerator``.
        accumulation: Further options of the windows, as of :class:`floragrad.GradientAccumulator`.
        defer_reduction: FSDP2 reduces once in a window, sketches of whole tensors, instead of in every micro-batch.
        **kwargs: Of ``accelerate.Accelerator``.

    Raises:
        TypeError: ``accumulation`` is no dictionary.
        ValueError: The rank is given twice, there is no such option, or nothing is deferred.

    Example:
        >>> from floragrad import Flora
        >>> accelerator = FloraAccelerator(gradient_accumulation_steps=4, cpu=True)
        >>> model = torch.nn.Linear(256, 256)
        >>> model, optimizer = accelerator.prepare(model, Flora(model.parameters(), lr=1e-3, rank=32))
        >>> for batch in torch.ones(8, 2, 256):
        ...     with accelerator.accumulate(model):
        ...         accelerator.backward(model(batch).square().mean())
        ...         if accelerator.sync_gradients:
        ...             norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> accelerator.end_training()
    """

    accumulator_type: type[GradientAccumulator] = AcceleratedAccumulator
    _defers_reduction = False

    def __init__(
        self,
        accumulation_compression_rank: int | None = None,
        *args: Any,
        accumulation: AccumulationOptions | None = None,
        defer_reduction: bool = False,
        **kwargs: Any,
    ) -> None:
        options = checked_options(accumulation)
        if accumulation_compression_rank is not None:
            if options.get("rank") is not None:
                raise ValueError("accumulation_compression_rank and accumulation={'rank': ...}: give one of them")
            options["rank"] = accumulation_compression_rank
        super().__init__(*args, **kwargs)
        self.set_accumulation_options(options)
        if defer_reduction and not (self.is_fsdp2 and self.window_steps > 1):
            raise ValueError(
                "defer_reduction=True defers what FSDP2 does in each of several micro-batches: give an fsdp_plugin "
                "with fsdp_version=2 and gradient_accumulation_steps of 2 or more, or leave it out"
            )
        self._defers_reduction = defer_reduction

    def set_accumulation_options(self, options: AccumulationOptions) -> None:
        """Set the options and Flora's attributes, also of an ``Accelerator`` that was constructed elsewhere."""
        self._accumulation_options = options
        self._unsynced = Unsynced()
        self._prepared: list[nn.Module] = []

    @property
    def accumulators(self) -> tuple[GradientAccumulator, ...]:
        """Accumulators of the prepared optimizers, in order; after :meth:`end_training` closed ones.

        Their ``report()`` says how each gradient is kept, and in how many bytes.
        """
        return tuple(each.accumulator for each in self._windows() if each.accumulator is not None)

    @property
    def window_steps(self) -> int:
        """Number of micro-batches of a window."""
        return int(self.gradient_accumulation_steps)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare objects as Accelerate does; windows of sharded parameters begin after sharding."""
        prepared = super().prepare(*args, **kwargs)
        if self.is_fsdp2 and self.window_steps > 1:
            for optimizer in self._windows():
                if optimizer.window is None:
                    self._begin_windows(optimizer)
        return prepared

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Skip synchronization as Accelerate does; shards are summed in every micro-batch, before they are folded."""
        if self.is_fsdp2 and self.window_steps > 1:
            yield
            return
        with super().no_sync(model):
            yield

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> Any:
        """Prepare an optimizer as Accelerate does, with an accumulator.

        Raises:
            RuntimeError: Parameters are hidden in flat ones, or accumulated by another accelerator.
            ValueError: An option of the accumulation is wrong.
        """
        if self.window_steps == 1:
            return super().prepare_optimizer(optimizer, device_placement)
        if self.distributed_type not in _WHOLE and not self.is_fsdp2:
            raise RuntimeError(
                f"gradient accumulation under {self.distributed_type}: sketches are of matrices, which it hides; train "
                "with DistributedDataParallel, FSDP2 (fsdp_version=2) or in one process, or use accelerate.Accelerator"
            )
        if not isinstance(optimizer, AcceleratedOptimizer):
            placement = self.device_placement if device_placement is None else device_placement
            optimizer = AccumulatingOptimizer(optimizer, device_placement=placement, scaler=self.scaler)
            optimizer._is_accelerate_prepared = True  # or it would be wrapped once more
        if not isinstance(optimizer, AccumulatingOptimizer):
            raise RuntimeError("the optimizer was prepared by another accelerator: prepare the bare optimizer")
        if optimizer.window is None and not self.is_fsdp2:
            self._begin_windows(optimizer)
        prepared = super().prepare_optimizer(optimizer)
        for model in self._prepared:
            self._unsynced.hold(model, optimizer.trained)
        return prepared

    def prepare_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Prepare a model as Accelerate does; with an accumulator, its gradients are averaged as sketches."""
        prepared = super().prepare_model(model, *args, **kwargs)
        if self.window_steps > 1:
            self._prepared.append(prepared)
            self._unsynced.hold(prepared, self._trained())
        return prepared

    def join_uneven_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Join uneven inputs as Accelerate does, in one process or without accumulation.

        Raises:
            RuntimeError: Several processes accumulate.
        """
        if self.window_steps > 1 and self.distributed_type != DistributedType.NO:
            raise RuntimeError(
                "join_uneven_inputs with accumulation: it stands in for collectives of DistributedDataParallel, which "
                "averages nothing here; leave it out, with even_batches=True all processes have as many batches"
            )
        return super().join_uneven_inputs(*args, **kwargs)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Run the backward pass as Accelerate does; each gradient is folded and freed at once.

        Raises:
            RuntimeError: The window has its last micro-batch already, or a parameter has no window.
            ValueError: A parameter of a prepared model has a gradient, and no optimizer.
        """
        self._unsynced.check(self._trained())
        with ExitStack() as passes:
            for optimizer in self._windows():
                passes.enter_context(optimizer.micro_batch())
            super().backward(loss, **kwargs)
        owned = [param for each in self._optimizers for group in each.param_groups for param in group["params"]]
        for model in self._prepared:
            check_owned(model.named_parameters(), owned)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """Clip as Accelerate does; with release, the norm is estimated from the sketches.

        Returns:
            The global norm before clipping.

        Raises:
            RuntimeError: A window is not complete.
            ValueError: With release, other parameters than one optimizer's, or another norm than 2.
        """
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        optimizer = self._releasing(given)
        if optimizer is None:
            return super().clip_grad_norm_(given, max_norm, norm_type)
        if norm_type != 2:
            raise ValueError(f"norm_type={norm_type}: sketches know the 2-norm alone; {_MATERIALISE}")
        if {id(p) for p in given if p.requires_grad} != {id(p) for p in optimizer.trained}:
            raise ValueError(
                "clip_grad_norm_ of other parameters than those that one optimizer trains: give it all of them, "
                f"freeze what is not trained (requires_grad_(False)), or {_MATERIALISE}"
            )
        assert optimizer.window is not None
        return optimizer.window.clip_grad_norm_(max_norm)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clip gradients in ``.grad`` as Accelerate does.

        Raises:
            RuntimeError: A window is not complete.
            ValueError: The gradients are not in ``.grad``, with release.
        """
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if self._releasing(given) is not None:
            raise ValueError(f"clip_grad_value_ of gradients that are kept as sketches: {_MATERIALISE}")
        super().clip_grad_value_(given, clip_value)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Unscale as Accelerate does; a window is unscaled with its norm."""
        given = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        for each in self._optimizers if optimizer is None else given:
            window = each.window if isinstance(each, AccumulatingOptimizer) else None
            if window is None:
                super().unscale_gradients(each)
            elif self.scaler is not None and window.flush():
                _ = window.grad_norm

    def free_memory(self, *objects: Any) -> Any:
        """Free memory as Accelerate does, and remove hooks and sketches."""
        self.detach()
        return super().free_memory(*objects)

    def end_training(self) -> None:
        """End the training as Accelerate does, and remove hooks and sketches."""
        self.detach()
        super().end_training()

    def detach(self) -> None:
        """Remove all hooks and free the sketches; wrappers average gradients again."""
        for optimizer in self._windows():
            optimizer.detach()
        self._unsynced.release()
        self._prepared.clear()

    def _begin_windows(self, optimizer: AccumulatingOptimizer) -> None:
        deferred = self._models[-1] if self._defers_reduction else None
        accumulator = self.accumulator_type(
            optimizer.optimizer,
            self.window_steps,
            scaler=self.scaler,
            defer_reduction=deferred,
            **self._accumulation_options,
        )
        optimizer.attach_window(accumulator)
        # A deleted accelerator leaves no hooks, even if its optimizers are still referenced.
        weakref.finalize(self, _forget, weakref.ref(optimizer)).atexit = False

    def _trained(self) -> list[Tensor]:
        """Return the parameters with a window."""
        return [param for each in self._windows() if each.window is not None for param in each.trained]

    def _windows(self) -> list[AccumulatingOptimizer]:
        return [each for each in self._optimizers if isinstance(each, AccumulatingOptimizer)]

    def _releasing(self, parameters: list[Tensor]) -> AccumulatingOptimizer | None:
        """End the windows of these parameters; return the optimizer that releases their gradients, if any.

        Raises:
            RuntimeError: A window is not complete.
        """
        wanted, releasing = {id(param) for param in parameters}, None
        for each in self._windows():
            if each.window is None or not wanted & {id(param) for param in each.trained}:
                continue
            if not self.sync_gradients or not each.window.flush():
                raise RuntimeError(
                    "clipping a window that is not complete: clip after backward(), "
                    "under `if accelerator.sync_gradients:`"
                )
            if each.window.releases:
                releasing = each
        return releasing


def _forget(lost: "weakref.ref[AccumulatingOptimizer]") -> None:
    optimizer = lost()
    if optimizer is not None:
        optimizer.window = optimizer.accumulator = None


_MATERIALISE = "accumulation={'release': False} leaves the window's sum in .grad, for everything that reads it"
