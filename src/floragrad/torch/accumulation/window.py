"""State of a window of accumulation, and the entries of its parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from floragrad.policy import AccumulatorPlan
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.distributed.collectives import is_sharded, to_local
from floragrad.torch.part import Part
from floragrad.torch.validation import check_shape, gradient_dtype, validate_gradient


@dataclass
class Window:
    """State of one window, from its first micro-batch to its step.

    Attributes:
        number: Number of earlier windows; key of its projections.
        steps: Micro-batches of a full window.
        seen: Micro-batches that have ended.
        dropped: Dropped micro-batches, the open one included.
        weighted: True if weights were given; None before the first micro-batch.
        ended: True after the last micro-batch.
        ranks: Processes that it is summed over.
        total: Micro-batches of all of them, once they have been summed; None before, and with one process.
        weight: Of the open micro-batch; None where none is open.
        total_weight: Sum of the weights of the kept micro-batches that have ended.
        last: True if the open micro-batch, or the one that ended last, is the last.
        is_dropped: True if the open micro-batch was dropped.
        failed: True after a failed backward pass, or a failed step that had updated some parameters.
        is_late: True while gradients are added to ``.grad`` after the end of the window.
        unscaled: True if ``.grad`` has been divided by the scaler's scale.
        norm: The global norm, once computed.
        clip: Factor of all gradients that clips them.
    """

    steps: int
    index: int = 0
    seen: int = 0
    dropped: int = 0
    weighted: bool | None = None
    ended: bool = False
    ranks: int = 1
    total: int | None = None
    weight: float | None = None
    total_weight: float = 0.0
    last: bool = False
    is_dropped: bool = False
    failed: bool = False
    is_late: bool = False
    unscaled: bool = False
    norm: Tensor | None = None
    clip: Tensor | float = 1.0

    @property
    def is_open(self) -> bool:
        """True while gradients are expected."""
        return self.weight is not None

    @property
    def kept(self) -> int:
        """Number of micro-batches in the sum, the open one included."""
        return self.seen + self.is_open - self.dropped

    @property
    def mean_factor(self) -> float:
        """Factor from the sum of 1/steps times each gradient to their mean over all ranks.

        With weights: from the sum to its mean over the ranks.
        """
        if self.weighted:
            return 1.0 / self.ranks
        count = self.kept if self.total is None else self.total
        return self.steps / count if count else 1.0


@dataclass(eq=False)
class ParamEntry:
    """Entry of one parameter under accumulation.

    Attributes:
        tensor_id: Key of its random streams, unique among all parameters of the optimizers.
        name: Its name in the optimizer.
        param: The parameter.
        optimizer: Its optimizer.
        plan: Plan of its sketch, for the local part.
        sketch: Its sum of gradients; None where no gradient is ever kept.
        unreduced: Sum of this process's gradients of the whole tensor, until it is reduced to ``sketch`` when the
            window ends; None where FSDP2 reduces them.
        part: Local part of a sharded parameter; None for whole ones.
        folded: True if a gradient of the open micro-batch has been folded.
        updated: True if it was updated inside the window's last backward pass.
        handles: Of its hooks.
    """

    tensor_id: int
    name: str
    param: Tensor
    optimizer: Optimizer
    plan: AccumulatorPlan
    sketch: GradientSketch | None
    unreduced: GradientSketch | None = None
    part: Part | None = None
    folded: bool = False
    updated: bool = False
    handles: list[RemovableHandle] = field(default_factory=list, repr=False)

    @property
    def held(self) -> GradientSketch | None:
        """The sketch that holds the gradients of the window so far."""
        return self.unreduced if self.unreduced is not None and self.unreduced.folds else self.sketch

    @property
    def is_held(self) -> bool:
        """True if a sketch holds a gradient."""
        return self.held is not None and self.held.folds > 0

    @property
    def sketches(self) -> list[GradientSketch]:
        """Those that there are."""
        return [sketch for sketch in (self.sketch, self.unreduced) if sketch is not None]

    @property
    def has_gradient(self) -> bool:
        """True if the window has seen a gradient of it."""
        return self.is_held or self.updated or self.param.grad is not None

    def renumber(self, tensor_id: int) -> None:
        """Draw with another id from the next window on."""
        self.tensor_id = tensor_id
        for sketch in self.sketches:
            sketch.tensor_id = tensor_id

    def local_grad(self) -> Tensor | None:
        """Return the local part of ``.grad``.

        Raises:
            RuntimeError: The parameter was resized after the accumulator was made.
        """
        check_shape(self.name, to_local(self.param).shape, self.plan.shape)
        if is_sharded(self.param) and self.param.grad is not None:
            from floragrad.torch.distributed.shards import local_gradient

            return local_gradient(self.param)
        return self.param.grad

    def write_mean(self, window: Window, grad_weight: float, factor: float | Tensor) -> bool:
        """Set ``.grad`` to factor · (grad_weight · grad + decode(C)), in place where there is one.

        Returns:
            False where the window has seen no gradient of this parameter: ``.grad`` stays None.
        """
        grad = self.local_grad()
        if grad is not None:
            grad = validate_gradient(self.name, grad, self.plan.shape, self.param.dtype, self.param.device)
        if self.sketch is None or self.sketch.folds == 0:
            if grad is not None and (isinstance(factor, Tensor) or grad_weight * factor != 1.0):
                grad.mul_(factor.to(grad.device) * grad_weight if isinstance(factor, Tensor) else factor * grad_weight)
                self._put(grad)
            return grad is not None
        if grad is None:
            grad, grad_weight = (
                torch.empty(self.plan.shape, dtype=gradient_dtype(self.param), device=self.param.device),
                0.0,
            )
        else:
            grad = grad.contiguous()
        self.sketch.decode_into(grad, window.index, grad_weight, factor)
        self._put(grad)
        return True

    def _put(self, local: Tensor) -> None:
        """Set ``.grad`` from its local part."""
        if is_sharded(self.param):
            from floragrad.torch.distributed.shards import as_gradient

            local = as_gradient(self.param, local)
        self.param.grad = local


@contextmanager
def no_grad_no_autocast(device: torch.device) -> Iterator[None]:
    """Disable autograd and autocast, which a backward pass may run under."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
