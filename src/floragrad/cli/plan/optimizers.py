"""The rows of a plan: how each of them makes a model trainable, and which optimizer it takes.

Every one is what its users run: torch's fused AdamW, bitsandbytes' 8-bit AdamW, Hugging Face's Adafactor, peft's
LoRA, galore-torch, and Flora. All get the parameter groups of :func:`floragrad.param_groups`.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer

from floragrad._extras import require
from floragrad.cli.plan.result import OptimizerName, PlanSettings
from floragrad.torch import Flora, GradientAccumulator, param_groups

LR: Final = 1e-3
"""Any: no byte depends on it."""


def _whole(model: nn.Module, _: PlanSettings) -> nn.Module:
    return model


def _with_adapters(model: nn.Module, settings: PlanSettings) -> nn.Module:
    peft = require("peft", "plan")
    with warnings.catch_warnings():
        # It tells that a layer of GPT-2 stores its matrix transposed, and takes care of it itself.
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        adapted: nn.Module = peft.get_peft_model(
            model, peft.LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules="all-linear")
        )
    return adapted


def _adamw(model: nn.Module, _: PlanSettings) -> Optimizer:
    return torch.optim.AdamW(param_groups(model, lr=LR), lr=LR, fused=True)


def _adamw_8bit(model: nn.Module, _: PlanSettings) -> Optimizer:
    groups = param_groups(model, lr=LR)
    # The constructor looks at the numbers of its tables, which fake tensors do not have.
    with unset_fake_temporarily():
        optimizer: Any = require("bitsandbytes", "plan").optim.AdamW8bit(groups, lr=LR)
    fake = active_fake_mode()
    if fake is not None:
        optimizer.name2qmap = {name: fake.from_tensor(table) for name, table in optimizer.name2qmap.items()}
    return optimizer  # type: ignore[no-any-return]


def _adafactor(model: nn.Module, _: PlanSettings) -> Optimizer:
    made: Optimizer = require("transformers.optimization", "plan").Adafactor(
        param_groups(model, lr=LR), lr=LR, beta1=0.9, scale_parameter=False, relative_step=False
    )
    return made


def _galore(model: nn.Module, settings: PlanSettings) -> Optimizer:
    options = {"rank": settings.rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    groups = []
    for group in param_groups(model, lr=LR):
        if group["kind"] == "matrix":
            flat = [pair for pair in group["params"] if pair[1].dim() == 2]
            stacked = [pair for pair in group["params"] if pair[1].dim() != 2]
            groups += [{**group, "params": flat, **options}, {**group, "params": stacked}]
        else:
            groups.append(group)
    made: Optimizer = require("galore_torch", "plan").GaLoreAdamW(
        [group for group in groups if group["params"]], lr=LR, no_deprecation_warning=True
    )
    return made


def _flora(model: nn.Module, settings: PlanSettings) -> Optimizer:
    far: dict[str, Any] = {"rank": settings.rank} if settings.ratio is None else {"ratio": settings.ratio}
    return Flora(param_groups(model, lr=LR), lr=LR, state_dtype=settings.state_dtype, **far)


@dataclass(frozen=True)
class Row:
    """How one row of a plan trains.

    Attributes:
        package: What it takes beside torch and floragrad; None where nothing more.
        adapted: The model that is trained, made of the one that was asked for.
        optimizer: Of that model.
        clip: Whether :class:`floragrad.GradientAccumulator` gathers gradients, and then whether their norm is
            clipped before anything is updated; None accumulates in ``.grad``, and clips.
    """

    package: str | None
    adapted: Callable[[nn.Module, PlanSettings], nn.Module]
    optimizer: Callable[[nn.Module, PlanSettings], Optimizer]
    clip: bool | None = None

    def load(self) -> None:
        """Import what it takes. Libraries make tensors as they are imported, which a trace would count, and fake."""
        if self.package is not None:
            require(self.package, "plan")

    def accumulator(self, optimizer: Optimizer, steps: int) -> GradientAccumulator | None:
        """What gathers the gradients of a window; None where ``.grad`` does."""
        return None if self.clip is None else GradientAccumulator(optimizer, steps, clip=self.clip)


ROWS: Final[dict[OptimizerName, Row]] = {
    "adamw": Row(None, _whole, _adamw),
    "adamw-8bit": Row("bitsandbytes", _whole, _adamw_8bit),
    "adafactor": Row("transformers.optimization", _whole, _adafactor),
    "lora": Row("peft", _with_adapters, _adamw),
    "galore": Row("galore_torch", _whole, _galore),
    "flora": Row(None, _whole, _flora),
    "flora+accumulator": Row(None, _whole, _flora, clip=True),
    "flora+release": Row(None, _whole, _flora, clip=False),
}


def why_not(name: OptimizerName, settings: PlanSettings) -> str | None:
    """Why a row cannot be planned, in a line; None where it can."""
    row = ROWS[name]
    try:
        row.load()
    except ImportError as error:
        return str(error)
    devices = max(settings.ddp, settings.fsdp)
    if row.clip is not None and devices > 1:
        return f"GradientAccumulator is planned for one process, and {devices} devices were asked for: plan flora"
    return None


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """Every tensor that an optimizer keeps between steps, GaLore's projections too."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                yield value
            elif hasattr(value, "ortho_matrix"):
                yield value.ortho_matrix
