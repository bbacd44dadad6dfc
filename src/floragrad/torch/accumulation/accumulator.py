"""Gradient accumulation without gradient buffers: the accumulator that users construct."""

import warnings
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from floragrad.policy import Projection, StateDtype
from floragrad.torch.accumulation.all_reduce import all_reduce_window
from floragrad.torch.accumulation.checkpoint import check_window, load_window, window_state
from floragrad.torch.accumulation.entries import ParamEntries, owners_of
from floragrad.torch.accumulation.grad_checks import FoldedGradCheck
from floragrad.torch.accumulation.micro_batches import MicroBatches
from floragrad.torch.accumulation.replicas import check_replicas, shard_difference
from floragrad.torch.accumulation.report import AccumulatorReport, accumulator_row
from floragrad.torch.accumulation.settings import (
    Settings,
    as_optimizers,
    can_release,
    check_clip,
    check_drop,
    check_interval,
    check_release,
    ranks_of,
)
from floragrad.torch.accumulation.steppers import MaterialiseStepper, ReleaseStepper, Stepper
from floragrad.torch.accumulation.window import Window, no_grad_no_autocast
from floragrad.torch.dynamo import disable_dynamo

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from floragrad.torch.accumulation.deferred import DeferredReduction


class GradientAccumulator(MicroBatches):
    r"""Mean gradient of a window of micro-batches, kept as low-bit sketches.

    As soon as the backward pass has a gradient gᵢ, it is folded into its tensor's sketch and freed; P is drawn
    anew for every window::

        C ← round(C + wᵢ encode(gᵢ))       wᵢ = 1 / steps       Ĝ = decode(C)

    Rounding is stochastic and P random, so that Ĝ is the exact mean of the gradients in the mean, and its norm
    is known from ‖C‖ before anything is decoded. Vectors are summed exactly, in float32; vocabulary-like
    tensors keep every column.

    A window ends in one of two ways. With *release* (Flora, or an optimizer for each parameter), :meth:`step`
    decodes, updates and frees one tensor after the other. Otherwise the mean is left in ``.grad``, for any
    optimizer. Do not divide the loss by ``steps``.

    With several processes the sketches are summed over them when a window ends, in the bits that they are kept in,
    and all ranks are left with the same mean over all micro-batches (with weights: the mean over ranks of their
    sums), so that parameters that began alike stay alike, bit for bit. Nothing else is sent: the model is not
    wrapped in DistributedDataParallel, or is run in its ``no_sync()``. Every rank ends, steps and drops the same
    windows. The last gradients are folded too, and ``steps=1`` sends compressed gradients in every step.

    Gradients of sharded parameters (FSDP2) are summed by FSDP2; the local shard of each is folded into a
    sketch of its own. Without a ``process_group`` only norms are communicated; with one, of the replicas of each
    shard, their sketches are summed when a window ends (HSDP).

    Args:
        optimizer: Flora, any other optimizer, or a list of optimizers.
        steps: N, the micro-batches of a window. With 1 nothing is kept: plain gradient release.
        ratio: ρ, the columns of a matrix that share one element; 1 keeps every column.
        rank: The rank instead: ρ = min(m, n) // rank.
        state_dtype: Storage of the sketches: ``"int4"``, ``"int8"``, ``"bfloat16"`` or ``"float32"``.
        projection: ``"sign"``, or ``"gaussian"`` (the paper's).
        seed: Of projections and rounding.
        release: None releases where the optimizer can update one parameter at a time; False leaves the mean in
            ``.grad`` with every optimizer.
        clip: With release: whether the norm is needed before the update, to clip by it, to log it, or for a
            scaler. True folds the last gradients as well and updates in :meth:`step`; False updates inside the
            last backward pass, and the last gradients are used whole. None: True, but False with ``steps=1``,
            one process and no scaler.
        scaler: Of fp16 training: :meth:`backward` scales the loss, :meth:`step` skips the window where a
            gradient was not finite; ``scaler.update()`` stays yours to call.
        drop_nonfinite: Drop every micro-batch with a gradient that is not finite, as :meth:`drop_micro_batch` does.
            A second copy of the sketches is kept for it.
        process_group: The processes that train together, each with micro-batches of its own and an accumulator
            made alike. None: the default group, or this process alone where there is none; with sharded parameters
            nobody, for their gradients are summed already. Shards that are replicated (HSDP) give the group of their
            replicas, and FSDP2 the mesh of the shards alone.
        defer_reduction: Model under ``fully_shard`` whose gradients are not reduced in each micro-batch. Each process
            folds the gradients of whole tensors into sketches, which are reduced to the shards when a window ends.
            None: FSDP2 reduces every micro-batch.
        check_replicas_every: Compare checksums of the weights over the processes of the group every so many windows,
            the first included, and raise on all of them where one differs. None: never.

    Raises:
        ValueError: An option has a wrong value, or options contradict each other.
        TypeError: ``optimizer`` is none.
        RuntimeError: A parameter has an accumulator already.

    Example:
        >>> from floragrad import Flora
        >>> model = torch.nn.Linear(256, 256)
        >>> accumulator = GradientAccumulator(Flora(model.parameters(), lr=1e-3, rank=32), steps=4)
        >>> for batch in torch.ones(8, 2, 256):
        ...     accumulator.backward(model(batch).square().mean())
        ...     if accumulator.complete:
        ...         norm = accumulator.clip_grad_norm_(1.0)
        ...         updated = accumulator.step()
        >>> report = accumulator.report()
        >>> report.state_bytes < report.exact_bytes / 6
        True
        >>> accumulator.close()

    Source: Hao, Cao, Mou, "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024, algorithm 1.
    Deviations: signs instead of a Gaussian matrix, low-bit storage instead of fewer columns by default, the last
    gradient exact where possible, vocabulary-like tensors not projected.
    """

    expects_gradients = True

    def __init__(
        self,
        optimizer: Optimizer | Iterable[Optimizer],
        steps: int,
        *,
        ratio: int = 1,
        rank: int | None = None,
        state_dtype: StateDtype | torch.dtype = "int4",
        projection: Projection = "sign",
        seed: int = 0,
        release: bool | None = None,
        clip: bool | None = None,
        scaler: GradScaler | None = None,
        drop_nonfinite: bool = False,
        process_group: "ProcessGroup | None" = None,
        defer_reduction: nn.Module | None = None,
        check_replicas_every: int | None = None,
    ) -> None:
        self._settings = Settings.checked(
            steps=steps, ratio=ratio, rank=rank, state_dtype=state_dtype, projection=projection, seed=seed
        )
        optimizers = as_optimizers(optimizer)
        self._ranks = ranks_of(process_group, optimizers)
        release = can_release(optimizers) if release is None else release
        if release:
            check_release(optimizers)
        check_clip(clip, release, scaler, self._ranks, is_deferred=defer_reduction is not None)
        check_interval(check_replicas_every)
        self._check_replicas_every = check_replicas_every
        if drop_nonfinite:
            check_drop(clip, scaler, optimizers)
        self._drops_nonfinite = drop_nonfinite
        self._finite: list[Tensor] = []
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._deferred = None if defer_reduction is None else _deferred(defer_reduction)
        shared = self._ranks is not None or self._deferred is not None
        folds_last = steps > 1 or self._scaler is not None or shared or drop_nonfinite
        needs_norm = folds_last if clip is None else clip
        sketched = steps > 1 or (release and needs_norm) or shared
        rank = self._ranks.rank if self._ranks else 0
        self._entries = ParamEntries(optimizers, self._settings, sketched, self, rank, self._deferred)
        self._window = self._fresh(0)
        self._folded_grads = FoldedGradCheck(self._entries, shared)
        self._stepper: Stepper = (
            ReleaseStepper(self._entries, optimizers, needs_norm, self._scaler, self.remedies)
            if release
            else MaterialiseStepper(self._entries, optimizers, not shared, self._scaler)
        )
        self._closed = self._has_received = False
        self._last_report: AccumulatorReport | None = None
        self._remove_hooks = weakref.finalize(self, _remove_hooks, self._entries, self._stepper)
        self._remove_hooks.atexit = False

    @property
    def complete(self) -> bool:
        """True once the window has all its micro-batches, until :meth:`step`."""
        return self._window.ended

    @property
    def releases(self) -> bool:
        """True if tensors are updated one at a time; else ``.grad`` holds the mean of a complete window."""
        return self._stepper.is_release

    @property
    def accepts_late_passes(self) -> bool:
        """True if more gradients can be added in ``.grad`` to the sum of a complete window."""
        self._begin_window_if_freed()
        window = self._window
        cannot = self.releases or not self._stepper.keeps_last or window.unscaled or self._drops_nonfinite
        return window.ended and not cannot

    @property
    def is_shared(self) -> bool:
        """True if the sketches are summed over several processes."""
        return self._ranks is not None

    @disable_dynamo
    def flush(self) -> bool:
        """End the window early, as at the end of an epoch; if it returns True, clip and step as usual.

        Without weights the window gives the mean of the micro-batches that there were. With several processes all
        of them call it, those too that have had no micro-batch; as long as one has had some, all have a window.
        Where their numbers of micro-batches differ by more than a window: ``while accumulator.flush(): ...``.

        Returns:
            Whether there is a window to step.
        """
        self._check_idle()
        self._begin_window_if_freed()
        window = self._window
        if not window.ended and (window.seen or self._ranks is not None):
            if not window.seen:
                self._entries.sync()
            self._check_no_gradients()
            self._end()
        return window.ended

    @disable_dynamo
    def flush_if_received(self) -> None:
        """End the window if any process has a gradient of the last micro-batch."""
        fed = any(entry.folded for entry in self._entries)
        if fed if self._ranks is None else self._ranks.all_reduce_any([fed], self._entries.device)[0]:
            self.flush()

    @property
    @disable_dynamo
    def grad_norm(self) -> Tensor:
        """Global norm of the complete window's mean gradient before clipping, a tensor of one element.

        With release it is estimated from the sketches, its square without bias; else it is the norm of ``.grad``.

        Raises:
            RuntimeError: The window is not complete, or tensors were updated before the norm was known.
        """
        self._check_complete("grad_norm")
        if self._window.norm is None:
            with no_grad_no_autocast(self._entries.device):
                self._window.norm = self._stepper.norm(self._window)
        return self._window.norm

    @disable_dynamo
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the window's mean gradient so that its global norm is at most ``max_norm``.

        Returns:
            :attr:`grad_norm`.

        Raises:
            RuntimeError: As :attr:`grad_norm`.
        """
        norm = self.grad_norm
        with no_grad_no_autocast(self._entries.device):
            self._stepper.clip(self._window, max_norm)
        return norm

    @disable_dynamo
    def step(self) -> bool:
        """Update the parameters with the window's mean gradient, and begin a new window.

        Returns:
            False where a scaler's window was skipped because a gradient was not finite.

        Raises:
            RuntimeError: The window is not complete.
        """
        self._check_complete("step()")
        self._entries.check_listed()
        self._stepper.warn_of_changed_grads()
        if self.releases:
            self._check_no_gradients()
        if self._scaler is not None:
            _ = self.grad_norm  # the scaler must know whether all gradients are finite
        with no_grad_no_autocast(self._entries.device):
            stepped = self._stepper.step(self._window)
        self._next_window()
        return stepped

    @disable_dynamo
    def zero_grad(self) -> None:
        """Drop the window, with all that it holds; nothing happens between two windows."""
        window = self._window
        for entry in self._entries:
            entry.param.grad = None
        if window.seen or window.is_open or window.ended:
            self._next_window()

    @disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return the window's position and its sketches; between two windows only the position.

        Inside a window every rank saves its own, and loads it again; one saved between two windows serves any
        number of ranks.

        Raises:
            RuntimeError: A micro-batch is open, or the window's end lies outside the sketches.
        """
        self._check_idle()
        self._begin_window_if_freed()
        window = self._window
        if window.ended and self._stepper.keeps_last:
            raise RuntimeError(
                "the window is complete and part of it lies in .grad or in updated parameters: "
                "save after step(), or before the last micro-batch"
            )
        return window_state(window, self._entries, self._settings, self._ranks)

    @disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume a window where another process left it.

        Args:
            state_dict: From :meth:`state_dict`, of an accumulator over the same parameters.

        Raises:
            ValueError: The window was begun with other settings, or over another model; nothing has been
                changed then.
            RuntimeError: A micro-batch is open.
        """
        self._check_idle()
        self._entries.sync()
        check_window(state_dict, self._entries, self._settings, self._ranks)
        self.zero_grad()
        self._window = load_window(state_dict, self._entries, self._fresh(0))

    @disable_dynamo
    def report(self) -> AccumulatorReport:
        """Report each tensor's sketch, its bytes and the reason for its format; ``print`` shows a table.

        After :meth:`close`, the report of the closed accumulator.
        """
        if self._last_report is not None:
            return self._last_report
        return AccumulatorReport(
            tuple(
                accumulator_row(
                    entry.name,
                    entry.plan,
                    entry.sketch is not None,
                    self._drops_nonfinite,
                    None if entry.unreduced is None else entry.unreduced.plan,
                )
                for entry in self._entries
            )
        )

    @disable_dynamo
    def close(self) -> None:
        """Remove every hook and free the sketches."""
        if self._closed:
            return
        if self._window.seen and not self._window.ended:
            warnings.warn(
                f"close() drops a window of {self._window.seen} micro-batches: flush() and step() keep it",
                UserWarning,
                stacklevel=2,
            )
        self._remove()

    @staticmethod
    def close_all(model: nn.Module) -> None:
        """Close every accumulator of a model's parameters, including those without a reference.

        An accumulator that nobody holds closes itself. After an error in a notebook the traceback still holds it.
        """
        for owner in owners_of(model.parameters()):
            owner.close()

    def __enter__(self) -> "GradientAccumulator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._remove()

    def _begin_window_if_freed(self) -> None:
        """Begin a new window where the mean was left in ``.grad`` and has been used and freed."""
        if self._window.ended and not self.releases and all(entry.param.grad is None for entry in self._entries):
            self._next_window()

    def _next_window(self) -> None:
        for entry in self._entries:
            entry.updated = False
            for sketch in entry.sketches:
                sketch.folds = 0
        self._window = self._fresh(self._window.index + 1)

    def _fresh(self, number: int) -> Window:
        return Window(self.steps, number, ranks=1 if self._ranks is None else self._ranks.size)

    def _end(self) -> None:
        """End the window, together with the other ranks; nothing where none has had a micro-batch."""
        with no_grad_no_autocast(self._entries.device):
            same_weights = self._deferred is None
            difference = shard_difference(self._window, self._entries, self._settings, same_weights=same_weights)
            if difference and self._ranks is None:
                raise RuntimeError(difference)
            if self._deferred is not None and not difference:
                self._deferred.reduce(self._entries, self._window.index)
            if self._window.kept if self._ranks is None else self._share(difference):
                self._note_received()
                if self.expects_gradients:
                    self.check_received()
                self._stepper.end(self._window)
                self._window.ended = True
            elif self._window.dropped:  # all of its micro-batches
                self._window = self._fresh(self._window.index)

    def _share(self, difference: str) -> bool:
        assert self._ranks is not None
        is_held = all_reduce_window(self._window, self._entries, self._settings, self._ranks, difference)
        index, every = self._window.index, self._check_replicas_every
        if is_held and every is not None and index % every == 0:
            check_replicas(list(self._entries), self._ranks, index)
        return is_held

    def _remove(self) -> None:
        if not self._closed:
            self._last_report = self.report()
        self._closed = True
        self._remove_hooks()


def _deferred(model: nn.Module) -> "DeferredReduction":
    from floragrad.torch.accumulation.deferred import DeferredReduction

    return DeferredReduction(model)


def _remove_hooks(entries: ParamEntries, stepper: Stepper) -> None:
    entries.release()
    stepper.close()
