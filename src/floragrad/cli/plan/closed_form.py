"""Bytes that stay between steps, from shapes alone: parameters, optimizer state, sketches; and gradients.

No step is run, so it is there at once for a model of any size; a trace must agree with it to the byte.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

from torch import Tensor, nn

from floragrad.cli.plan.optimizers import ROWS
from floragrad.cli.plan.result import LASTING, OptimizerName, PlanSettings
from floragrad.policy import Kind, plan_accumulator, plan_tensor
from floragrad.torch import param_groups
from floragrad.torch.report import adafactor_bytes, adamw_bytes

EIGHT_BIT_FROM: Final = 4096
"""Elements from which bitsandbytes keeps a tensor's state in 8 bits."""
EIGHT_BIT_BLOCK: Final = 256
"""Elements that share one scale there, and numbers of a quantile table."""


@dataclass(frozen=True)
class Kept:
    """Bytes that live from step to step, and those of all gradients together.

    Attributes:
        parameters: Of weights and buffers, each once.
        optimizer_state: After the first step.
        accumulation: Of sketches.
        gradients: Of everything that is trained.
    """

    parameters: int
    optimizer_state: int
    accumulation: int
    gradients: int

    @property
    def kept(self) -> tuple[int, ...]:
        """Bytes between steps, in the order of :data:`floragrad.cli.plan.result.LASTING`."""
        return tuple(getattr(self, name) for name in LASTING)


def closed_form(model: nn.Module, name: OptimizerName, settings: PlanSettings) -> Kept:
    """Return the bytes that a row keeps of a model.

    Args:
        model: As its row adapts it, on any device, the meta device too.
        name: The row.
        settings: The step.

    Example:
        >>> kept = closed_form(nn.Linear(64, 64), "adamw", PlanSettings())
        >>> kept.gradients == 4 * (64 * 64 + 64), kept.optimizer_state == 2 * kept.gradients + 2 * 4
        (True, True)
    """
    tensors = {*model.parameters(), *model.buffers()}
    trained = list(_trained(model))
    state = sum(_STATE[name](param, kind, settings) for param, kind in trained)
    if name == "adamw-8bit" and any(param.numel() >= EIGHT_BIT_FROM for param, _ in trained):
        state += 2 * 4 * EIGHT_BIT_BLOCK
    sketches = 0
    if ROWS[name].clip is not None and (settings.accumulate > 1 or ROWS[name].clip):
        sketches = sum(plan_accumulator(param.shape, kind=kind).state_bytes for param, kind in trained)
    return Kept(
        parameters=sum(map(_nbytes, tensors)),
        optimizer_state=state,
        accumulation=sketches,
        gradients=sum(_nbytes(param) for param, _ in trained),
    )


def _trained(model: nn.Module) -> Iterator[tuple[Tensor, Kind]]:
    for group in param_groups(model, lr=0.0):
        yield from ((param, group["kind"]) for _, param in group["params"])


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _adamw(param: Tensor, *_: Any) -> int:
    return adamw_bytes(tuple(param.shape), param.dtype)


def _adamw_8bit(param: Tensor, *_: Any) -> int:
    if param.numel() < EIGHT_BIT_FROM:
        return 2 * 4 * param.numel()
    return 2 * (param.numel() + 4 * ceil(param.numel() / EIGHT_BIT_BLOCK))


def _adafactor(param: Tensor, *_: Any) -> int:
    # Beside the moments it keeps the root mean square of every tensor.
    return adafactor_bytes(tuple(param.shape), param.dtype) + 4


def _galore(param: Tensor, kind: Kind, settings: PlanSettings) -> int:
    size = param.element_size()
    if kind != "matrix" or param.dim() != 2:
        return 2 * size * param.numel()
    longer, shorter = max(param.shape), min(param.shape)
    rank = min(settings.rank, shorter)
    # A float32 projection is a view of singular vectors, all of which stay; others are copied out of them.
    basis = shorter * shorter if size == 4 else shorter * rank
    return size * (2 * longer * rank + basis)


def _flora(param: Tensor, kind: Kind, settings: PlanSettings) -> int:
    rank = settings.rank if settings.ratio is None else None
    return plan_tensor(
        param.shape,
        rank=rank,
        ratio=settings.ratio,
        state_dtype=settings.state_dtype,
        kind=kind,
    ).state_bytes


_STATE: Final[dict[OptimizerName, Callable[[Tensor, Kind, PlanSettings], int]]] = {
    "adamw": _adamw,
    "adamw-8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "lora": _adamw,
    "galore": _galore,
    "flora": _flora,
    "flora+accumulator": _flora,
    "flora+release": _flora,
}
