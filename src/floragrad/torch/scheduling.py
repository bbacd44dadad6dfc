"""Options that learning-rate schedulers read and write."""

import warnings
from collections.abc import Iterable
from typing import Any

from floragrad.torch.options import check_option, relative_lr

Group = dict[str, Any]


def scheduler_defaults(defaults: Group, groups: Iterable[Group]) -> Group:
    """Return the defaults that schedulers read, with their names in ``torch.optim``.

    ``lr`` is the first group's where the constructor was given none. ``momentum`` says that ``OneCycleLR`` and
    ``CyclicLR`` may cycle it; it is β₁, where any group keeps a momentum.
    """
    groups = list(groups)
    lr = groups[0]["lr"] if defaults["lr"] is None else defaults["lr"]
    momentum = next((group["beta1"] for group in groups if group["beta1"]), None)
    return {"lr": lr} if momentum is None else {"lr": lr, "momentum": momentum}


def adopt_momentum(group: Group) -> None:
    """Set β₁ of a group to the ``momentum`` that a scheduler has written into it.

    Raises:
        ValueError: It is no decay of a momentum that is kept.
    """
    momentum = group.get("momentum")
    if momentum is None:
        return
    if group["beta1"]:
        check_option("beta1", momentum)
        if not momentum:
            raise ValueError("momentum=0 of a scheduler: the state keeps a momentum; give base_momentum > 0")
        group["beta1"] = momentum
    del group["momentum"]


def step_size(group: Group, step: int, rms: float) -> float:
    """Return the step size α of a parameter with root mean square ``rms``."""
    lr = relative_lr(group, step) if group["relative_step"] else float(group["lr"])
    return lr * max(group["eps"][1], rms) if group["scale_parameter"] else lr


def ignores_scheduler_lr(group: Group) -> bool:
    """Return whether a scheduler has set a learning rate that ``relative_step`` ignores.

    0 is not counted: ``AdafactorSchedule`` begins with it, and so does a warm-up.
    """
    return bool(group["relative_step"] and group["lr"] not in (0.0, relative_lr(group, 1)))


def warn_ignored_lr(group: Group, stacklevel: int) -> None:
    """Warn that a scheduler's learning rate changes nothing.

    Args:
        group: The options.
        stacklevel: Of the warning, as seen from the caller.
    """
    warnings.warn(
        f"lr={group['lr']!r} of a scheduler is ignored: relative_step=True derives the learning rate from "
        "the step; give lr=... and relative_step=False, or a constant schedule",
        UserWarning,
        stacklevel=stacklevel + 1,
    )
