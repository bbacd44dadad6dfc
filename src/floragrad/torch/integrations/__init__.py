"""Integrations with training libraries; each module needs its library alone."""

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from floragrad.policy import Projection, StateDtype

__all__ = ["AccumulationOptions"]


class AccumulationOptions(TypedDict, total=False):
    """Options of :class:`floragrad.GradientAccumulator` that a training loop may set; defaults are as there."""

    ratio: int
    rank: int | None
    state_dtype: StateDtype | torch.dtype
    projection: Projection
    seed: int
    release: bool | None
    drop_nonfinite: bool
    check_replicas_every: int | None


def checked_options(given: Any) -> AccumulationOptions:
    """Return the argument ``accumulation`` of a loop as options; None is no option.

    Raises:
        TypeError: It is no dictionary.
        ValueError: It has an unknown option.
    """
    allowed = list(AccumulationOptions.__annotations__)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"accumulation={given!r}: give a dictionary of options, as in accumulation={{'state_dtype': 'int8'}}; "
            f"they are {', '.join(allowed)}"
        )
    for name in given:
        if name not in allowed:
            raise ValueError(f"accumulation={{{name!r}: ...}}: there is no such option; they are {', '.join(allowed)}")
    return cast(AccumulationOptions, dict(given))


def check_owned(named: Iterable[tuple[str, Tensor]], owned: Iterable[Tensor]) -> None:
    """Refuse gradients of parameters that no optimizer trains.

    Args:
        named: The parameters of a model.
        owned: The parameters of the optimizers.

    Raises:
        ValueError: Naming the first of them, and how many there are.
    """
    known = {id(param) for param in owned}
    strangers = [name for name, param in named if param.grad is not None and id(param) not in known]
    if strangers:
        raise ValueError(
            f"{_some(strangers)}: gradients of parameters that no optimizer trains; make the optimizer of the "
            "parameters that are trained, after the model has got its adapters (get_peft_model, peft_config), or "
            "freeze what is not trained (requires_grad_(False))"
        )


def _some(names: list[str], shown: int = 3) -> str:
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
