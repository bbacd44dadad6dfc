"""The two ends of a window: gradient release, or the mean in ``.grad``."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from floragrad.torch.accumulation.grad_checks import GradWriteProbe
from floragrad.torch.accumulation.remedies import Remedies
from floragrad.torch.accumulation.window import ParamEntry, Window
from floragrad.torch.distributed.collectives import all_reduce_shards, is_sharded
from floragrad.torch.dynamo import caller_stacklevel
from floragrad.torch.optimizer import Flora
from floragrad.torch.part import EVERYWHERE, ShardSum


class ReleaseStepper:
    """Gradient release: each tensor is decoded, updated and freed before the next.

    Args:
        entries: The parameters.
        optimizers: Flora, or one for each parameter.
        clip: Fold the last gradient too, so that the norm is known before any tensor is updated; else tensors
            are updated inside the last backward pass, as soon as their gradient is there.
        scaler: Of the loss; None where it is not enabled.
        remedies: Alternatives to ``optimizer.step()`` and to changes of ``.grad``, for messages.
    """

    is_release = True

    def __init__(
        self,
        entries: Iterable[ParamEntry],
        optimizers: tuple[Optimizer, ...],
        clip: bool,
        scaler: GradScaler | None,
        remedies: Remedies,
    ) -> None:
        self._entries = entries
        self.keeps_last = not clip
        self._scaler = scaler
        self._remedies = remedies
        self._flora = optimizers[0] if isinstance(optimizers[0], Flora) and len(optimizers) == 1 else None
        self._carrier: Optimizer | None = None
        self._probe = GradWriteProbe(entries)
        self._stepping = self._has_warned = self._has_warned_of_grads = False
        self._was_changed = False
        self._handles = [each.register_step_pre_hook(self._warn_of_step) for each in optimizers]

    def last_gradient(self, entry: ParamEntry, window: Window) -> None:
        """Update the parameter at once, with a gradient of the last micro-batch."""
        if entry.updated:
            raise late_gradient_error(entry)
        self._update(entry, window, window.mean_factor)
        entry.updated = True

    def end(self, window: Window) -> None:  # noqa: ARG002
        """Place the zeros of :meth:`warn_of_changed_grads`; :meth:`step` updates the remaining tensors."""
        if self._scaler is None:  # a scaler would unscale the zeros
            self._probe.place()

    def warn_of_changed_grads(self) -> None:
        """Warn once where ``.grad`` was changed since the window ended."""
        self._remove_probe()
        was_changed, self._was_changed = self._was_changed, False
        if was_changed and not self._has_warned_of_grads:
            self._has_warned_of_grads = True
            warnings.warn(
                "gradients in .grad were changed, as by torch.nn.utils.clip_grad_norm_, without effect: with "
                f"release the window's mean is elsewhere; {self._remedies.clip}",
                UserWarning,
                stacklevel=caller_stacklevel(),
            )

    def norm(self, window: Window) -> Tensor:
        """Estimate the norm from the sketches, its square without bias; the scaler checks that it is finite."""
        if self.keeps_last:
            raise RuntimeError(
                "the norm is not known: with clip=False (the default for steps=1) tensors are updated inside "
                "the last backward pass; construct the accumulator with clip=True"
            )
        self._remove_probe()  # this caller does not look for gradients in .grad
        held = [(entry, entry.sketch.squared_norm()) for entry in self._entries if entry.sketch and entry.sketch.folds]
        if not held:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        all_reduce_shards(
            ShardSum(square, EVERYWHERE, entry.part, entry.tensor_id)
            for entry, square in held
            if entry.part is not None
        )
        squares = [square for _, square in held]
        total = torch.stack([square.to(squares[0].device) for square in squares]).sum()
        norm = total.clamp(min=0).sqrt() * window.mean_factor
        return norm if self._scaler is None else self._unscaled(norm, self._scaler)

    def clip(self, window: Window, max_norm: float) -> None:
        """Remember the factor for :meth:`step`."""
        assert window.norm is not None
        window.clip = (max_norm / (window.norm + 1e-6)).clamp(max=1.0)

    def step(self, window: Window) -> bool:
        """Decode, update and free the remaining tensors one by one."""
        factor: float | Tensor = window.clip * window.mean_factor
        if self._scaler is not None:
            assert window.norm is not None
            if not bool(window.norm.isfinite()):
                return False
            factor = factor / self._scaler.get_scale()
        try:
            for entry in self._entries:
                if not entry.updated:
                    self._update(entry, window, factor)
        except BaseException:
            window.failed = True  # a retry would update some parameters twice
            raise
        if self._flora is not None:
            # Without gradients it updates nothing; its hooks run, and schedulers see that it stepped.
            with self._own_step():
                self._flora.step()
        return True

    def close(self) -> None:
        """Remove the probe and the hooks."""
        self._probe.remove()
        for handle in self._handles:
            handle.remove()

    def _remove_probe(self) -> None:
        self._was_changed |= self._probe.remove()

    def _update(self, entry: ParamEntry, window: Window, factor: float | Tensor) -> None:
        if not entry.write_mean(window, window.weight or 0.0, factor):
            return
        if isinstance(entry.optimizer, Flora):
            entry.optimizer.step_parameter(entry.param)
        else:
            with self._own_step():
                entry.optimizer.step()
        entry.param.grad = None

    def _unscaled(self, norm: Tensor, scaler: GradScaler) -> Tensor:
        # A scaler checks the gradients of an optimizer for inf and NaN: give it an optimizer whose gradient is the
        # norm. It is kept, since the scaler identifies optimizers by their id.
        if self._carrier is None:
            self._carrier = torch.optim.SGD([torch.nn.Parameter(torch.zeros_like(norm))], lr=0.0)
        carried = self._carrier.param_groups[0]["params"][0]
        carried.grad = norm.clone()
        scaler.unscale_(self._carrier)
        unscaled, carried.grad = carried.grad, None
        assert isinstance(unscaled, Tensor)
        return unscaled

    @contextmanager
    def _own_step(self) -> Iterator[None]:
        before, self._stepping = self._stepping, True
        try:
            yield
        finally:
            self._stepping = before

    def _warn_of_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A step with a closure is intended: Lightning runs the last backward pass inside it.
        if not self._stepping:
            self._probe.remove()  # or the optimizer would step with zeros
        has_closure = any(given is not None for given in (*args[1:], *kwargs.values()))
        if not self._stepping and not has_closure and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "optimizer.step() does nothing here: a GradientAccumulator updates the parameters of this "
                f"optimizer; {self._remedies.step}",
                UserWarning,
                stacklevel=3,
            )


class MaterialiseStepper:
    """Materialised gradients: the window's mean is written to ``.grad``, for any optimizer.

    Args:
        entries: The parameters.
        optimizers: Any.
        keeps_last: Add the last micro-batch's gradient exactly; with several processes it is folded too, since it
            is averaged.
        scaler: Of the loss; None where it is not enabled.
    """

    is_release = False

    def __init__(
        self,
        entries: Iterable[ParamEntry],
        optimizers: tuple[Optimizer, ...],
        keeps_last: bool,
        scaler: GradScaler | None,
    ) -> None:
        self.keeps_last = keeps_last
        self._entries = entries
        self._optimizers = optimizers
        self._scaler = scaler

    def last_gradient(self, entry: ParamEntry, window: Window) -> None:
        """Do nothing: it stays in ``.grad`` until the backward pass is over."""

    def end(self, window: Window) -> None:
        """Decode the sketches into ``.grad``."""
        for entry in self._entries:
            entry.write_mean(window, window.weight or 0.0, window.mean_factor)

    def warn_of_changed_grads(self) -> None:
        """Do nothing: changes to ``.grad`` have their effect."""

    def norm(self, window: Window) -> Tensor:
        """Compute the norm of ``.grad`` as ``torch.nn.utils.clip_grad_norm_`` does."""
        self._unscale(window)
        norm = torch.nn.utils.get_total_norm(_gradients(self._entries))
        return norm.full_tensor() if is_sharded(norm) else norm

    def clip(self, window: Window, max_norm: float) -> None:
        """Scale ``.grad``."""
        assert window.norm is not None
        torch.nn.utils.clip_grads_with_norm_([entry.param for entry in self._entries], max_norm, window.norm)

    def step(self, window: Window) -> bool:
        """Step every optimizer, through the scaler if there is one, and free the gradients."""
        stepped: list[Optimizer] = []
        if self._scaler is not None:
            self._unscale(window)
        for optimizer in self._optimizers:
            handle = optimizer.register_step_post_hook(lambda each, *_: stepped.append(each))
            if self._scaler is None:
                optimizer.step()
            else:
                self._scaler.step(optimizer)
            handle.remove()
        for entry in self._entries:
            entry.param.grad = None
        return bool(stepped)

    def close(self) -> None:
        """Do nothing: there are no hooks."""

    def _unscale(self, window: Window) -> None:
        if self._scaler is not None and not window.unscaled:
            for optimizer in self._optimizers:
                self._scaler.unscale_(optimizer)
            window.unscaled = True


Stepper: TypeAlias = ReleaseStepper | MaterialiseStepper
"""The end of a window.

``keeps_last`` is true if the last micro-batch's gradients are used exactly, without a fold, and ``is_release`` if
tensors are updated one at a time. ``clip`` needs ``window.norm``, and ``step`` returns False where a scaler skipped it.
"""


def late_gradient_error(entry: ParamEntry) -> RuntimeError:
    """Return the error for a gradient of a parameter that was updated already."""
    return RuntimeError(
        f"{entry.name} was updated inside the window's last backward pass, and more of its gradient comes: "
        "several backward passes in a micro-batch, a parameter shared by reentrant checkpoints, or a gradient put "
        "into .grad by hand; construct the accumulator with clip=True, which updates in step()"
    )


def _gradients(entries: Iterable[ParamEntry]) -> list[Tensor]:
    return [entry.param.grad for entry in entries if entry.param.grad is not None]
