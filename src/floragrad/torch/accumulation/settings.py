"""Options of an accumulator with their checks, and the optimizers that it serves."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from floragrad._checks import accumulator_contradictions, check_contradictions, is_count
from floragrad.policy import AccumulatorPlan, Kind, Projection, StateDtype, plan_accumulator
from floragrad.torch.distributed.collectives import Ranks, is_sharded
from floragrad.torch.optimizer import Flora
from floragrad.torch.options import as_integers, check_option, state_dtype_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Settings:
    """Options that fix the sketches of a window, for all of its micro-batches."""

    steps: int
    ratio: int
    rank: int | None
    state_dtype: StateDtype
    projection: Projection
    seed: int

    @classmethod
    def checked(cls, **options: Any) -> "Settings":
        """Return the settings of a constructor's arguments.

        Raises:
            ValueError: An option has a wrong value, or two options contradict each other.
        """
        settings = cls(**{**options, "state_dtype": state_dtype_name(options["state_dtype"])})
        if not is_count(settings.steps):
            raise ValueError(f"steps={settings.steps!r}: must be an integer >= 1, the micro-batches of a window")
        for name in ("ratio", "rank", "state_dtype", "projection", "seed"):
            check_option(name, getattr(settings, name))
        check_contradictions(accumulator_contradictions(asdict(settings)))
        return replace(settings, **as_integers(asdict(settings), "steps", "ratio", "rank", "seed"))  # type: ignore[arg-type]

    def plan(self, shape: torch.Size, kind: Kind | None) -> AccumulatorPlan:
        """Return the policy's plan for one tensor."""
        return plan_accumulator(shape, ratio=self.ratio, rank=self.rank, state_dtype=self.state_dtype, kind=kind)

    def saved(self, device: torch.device) -> dict[str, Any]:
        """Return the settings for a checkpoint; with Gaussian projections the kind of device too."""
        extra = {"device_type": device.type} if self.projection == "gaussian" else {}
        return {**asdict(self), **extra}

    def check_saved(self, saved: dict[str, Any], device: torch.device) -> None:
        """Refuse a window that was begun with other settings.

        Raises:
            ValueError: Naming the setting, both values and the remedy.
        """
        for name, value in self.saved(device).items():
            if saved.get(name) != value:
                raise ValueError(
                    f"the saved window was begun with {name}={saved.get(name)!r}, this accumulator has "
                    f"{name}={value!r} and cannot finish it; construct it with {name}={saved.get(name)!r}, "
                    "or load a state that was saved between two windows"
                )


@dataclass(frozen=True)
class ListedParam:
    """Parameter of the optimizers with its id among all, name, kind and optimizer."""

    tensor_id: int
    name: str
    param: Tensor
    kind: Kind | None
    optimizer: Optimizer


def as_optimizers(given: Any) -> tuple[Optimizer, ...]:
    """Return one optimizer or several as a tuple.

    Raises:
        TypeError: It is something else.
        ValueError: There is none.
    """
    optimizers = (given,) if isinstance(given, Optimizer) else given
    if not isinstance(optimizers, Iterable):
        raise TypeError(f"optimizer is {type(given).__name__}: give a torch.optim.Optimizer, or a list of them")
    optimizers = tuple(optimizers)
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise TypeError(f"optimizer holds {type(each).__name__}: give torch.optim.Optimizer objects")
    if not optimizers:
        raise ValueError("optimizer is an empty list: give at least one")
    return optimizers


def listed_parameters(optimizers: tuple[Optimizer, ...]) -> Iterator[ListedParam]:
    """Yield all parameters in order, frozen ones too, so that ids stay when one is unfrozen.

    The ids are Flora's own, which are saved with its state; positions with other optimizers. An id that an earlier
    parameter has already is replaced by an unused one.
    """
    used: set[int] = set()
    position = 0
    for optimizer in optimizers:
        known = optimizer.tensor_ids() if isinstance(optimizer, Flora) else {}
        for group in optimizer.param_groups:
            names = group.get("param_names") or ()
            is_named = len(names) == len(group["params"])
            kind = group.get("kind") if group.get("kind") in get_args(Kind) else None
            for place, param in enumerate(group["params"]):
                tensor_id = known.get(param, position)
                tensor_id = max(used) + 1 if tensor_id in used else tensor_id
                used.add(tensor_id)
                yield ListedParam(
                    tensor_id, names[place] if is_named else f"parameter {position}", param, kind, optimizer
                )
                position += 1


def can_release(optimizers: tuple[Optimizer, ...]) -> bool:
    """Return whether every parameter can be updated separately."""
    single = all(sum(len(g["params"]) for g in each.param_groups) == 1 for each in optimizers)
    return single or (len(optimizers) == 1 and isinstance(optimizers[0], Flora))


def ranks_of(group: "ProcessGroup | None", optimizers: tuple[Optimizer, ...]) -> Ranks | None:
    """Return the processes that sum their sketches; None for one process, or where gradients are summed already.

    Raises:
        ValueError: Some parameters are sharded and some are not, without a process group.
    """
    ranks = Ranks.from_group(group)
    sharded = [is_sharded(each.param) for each in listed_parameters(optimizers)]
    if group is not None or ranks is None or not any(sharded):
        return ranks
    if not all(sharded):
        raise ValueError(
            "some parameters are sharded (DTensor), whose gradients are summed already, and some are whole, whose "
            "gradients each process has for itself: shard them all, or give the process_group to sum over"
        )
    return None


def check_release(optimizers: tuple[Optimizer, ...]) -> None:
    """Refuse to release with an optimizer that updates all its parameters at once.

    Raises:
        ValueError: Naming the optimizer and the remedies.
    """
    if not can_release(optimizers):
        names = ", ".join(sorted({type(each).__name__ for each in optimizers}))
        raise ValueError(
            f"release=True with {names}: it updates all its parameters at once; give one optimizer for each "
            "parameter ([AdamW([p], lr=...) for p in model.parameters()]), Flora, or release=False, which "
            "decodes the window's mean into .grad"
        )


def check_clip(
    clip: bool | None, release: bool, scaler: GradScaler | None, ranks: Ranks | None, *, is_deferred: bool = False
) -> None:
    """Refuse a ``clip`` that contradicts the way a window ends.

    Raises:
        ValueError: With the remedy.
    """
    if clip is False and not release:
        raise ValueError(
            "clip=False without release: nothing is updated inside the backward pass, and .grad can always be "
            "clipped; leave clip out"
        )
    if clip is False and scaler is not None and scaler.is_enabled():
        raise ValueError(
            "clip=False with a scaler: whether a gradient is not finite must be known before any tensor is "
            "updated; leave clip out"
        )
    if clip is False and ranks is not None:
        raise ValueError(
            f"clip=False with {ranks.size} processes: a tensor would be updated before its gradient has been "
            "averaged over them; leave clip out, and the update runs in step()"
        )
    if clip is False and is_deferred:
        raise ValueError(
            "clip=False with defer_reduction: a tensor would be updated before its gradient is reduced; leave clip "
            "out, and the update runs in step()"
        )


def check_interval(windows: int | None) -> None:
    """Refuse a wrong ``check_replicas_every``.

    Raises:
        ValueError: It is not a number of windows.
    """
    if windows is not None and not is_count(windows):
        raise ValueError(
            f"check_replicas_every={windows!r}: must be an integer >= 1, the windows between two checks, or None"
        )


def check_drop(clip: bool | None, scaler: GradScaler | None, optimizers: tuple[Optimizer, ...]) -> None:
    """Refuse ``drop_nonfinite`` where folds cannot be undone, or not by one process alone.

    Raises:
        ValueError: With the remedy.
    """
    if clip is False:
        raise ValueError(
            "drop_nonfinite=True with clip=False: tensors are updated before all gradients are known to be finite; "
            "leave clip out"
        )
    if scaler is not None and scaler.is_enabled():
        raise ValueError(
            "drop_nonfinite=True with a scaler: it lowers its scale by the windows that are not finite, and skips "
            "them; leave drop_nonfinite out"
        )
    if any(is_sharded(each.param) for each in listed_parameters(optimizers)):
        raise ValueError(
            "drop_nonfinite=True with sharded parameters: each process sees some of the gradients; look at the loss, "
            "and call drop_micro_batch() on all processes before the backward pass"
        )
