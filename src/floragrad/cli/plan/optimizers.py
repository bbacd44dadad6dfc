"""The rows of a plan: how each of them makes a model trainable, and which optimizer it takes.

Each is the implementation that users run: torch's fused AdamW, bitsandbytes' 8-bit AdamW, Hugging Face's Adafactor,
peft's LoRA, galore-torch, and Flora. All get the parameter groups of :func:`floragrad.param_groups`.
"""

from dataclasses import dataclass
from typing import Any, Final

from torch import nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer

from floragrad._extras import require
from floragrad.cli.peers import PEERS, with_adapters
from floragrad.cli.plan.result import OptimizerName, PlanSettings
from floragrad.torch import Flora, param_groups

LR: Final = 1e-3
"""Learning rate; no byte depends on it."""


@dataclass(frozen=True)
class Row:
    """Setting of one row of a plan.

    Attributes:
        peer: Optimizer, of :data:`floragrad.cli.peers.PEERS`; None for Flora.
        lora: Whether adapters are trained instead of the model.
        clip: Whether :class:`floragrad.GradientAccumulator` gathers gradients, and then whether their norm is
            clipped before anything is updated; None accumulates in ``.grad``, and clips.
    """

    peer: str | None = None
    lora: bool = False
    clip: bool | None = None

    def load(self) -> None:
        """Import its packages: they make tensors as they are imported, which a trace would count, and fake."""
        if self.peer is not None:
            PEERS[self.peer].load()
        if self.lora:
            require("peft", "plan")

    def adapted(self, model: nn.Module, settings: PlanSettings) -> nn.Module:
        """Return the model that is trained."""
        return with_adapters(model, settings.rank) if self.lora else model

    def optimizer(self, model: nn.Module, settings: PlanSettings) -> Optimizer:
        """Construct the peer of an adapted model."""
        assert self.peer is not None
        groups: Any = param_groups(model, lr=LR)
        peer = PEERS[self.peer]
        if self.peer != "adamw-8bit":
            return peer.optimizer(groups, LR, settings.rank)
        # The constructor reads the values of its tables, which fake tensors do not have.
        with unset_fake_temporarily():
            optimizer: Any = peer.optimizer(groups, LR)
        fake = active_fake_mode()
        if fake is not None:
            optimizer.name2qmap = {name: fake.from_tensor(table) for name, table in optimizer.name2qmap.items()}
        return optimizer  # type: ignore[no-any-return]

    def flora(self, model: nn.Module, settings: PlanSettings, **options: Any) -> Flora:
        """Construct Flora.

        Args:
            model: The model, also on the meta device.
            settings: The settings.
            **options: Others of Flora's.
        """
        width: dict[str, Any] = {"rank": settings.rank} if settings.ratio is None else {"ratio": settings.ratio}
        groups: Any = param_groups(model, lr=LR)
        return Flora(groups, lr=LR, state_dtype=settings.state_dtype, **width, **options)


ROWS: Final[dict[OptimizerName, Row]] = {
    "adamw": Row("adamw"),
    "adamw-8bit": Row("adamw-8bit"),
    "adafactor": Row("adafactor"),
    "lora": Row("adamw", lora=True),
    "galore": Row("galore"),
    "flora": Row(),
    "flora+accumulator": Row(clip=True),
    "flora+release": Row(clip=False),
}


def why_not(name: OptimizerName, settings: PlanSettings) -> str | None:
    """Return the reason a row cannot be planned, in one line; None where it can."""
    row = ROWS[name]
    try:
        row.load()
    except ImportError as error:
        return str(error)
    if row.clip is False and (settings.ddp > 1 or settings.defer_reduction):
        return f"{name} updates inside the backward pass, before gradients are averaged: plan flora+accumulator"
    return None
