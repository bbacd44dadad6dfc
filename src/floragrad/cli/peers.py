"""Other optimizers, set up as their users do: one table for ``floragrad train``, ``compare``, ``plan`` and benchmarks.

A peer takes parameter groups with a ``kind``, as :func:`floragrad.param_groups` makes them; its package is imported
when it is used.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from floragrad._extras import require

PROJECTION_GAP: Final = 200
"""Steps between two projections of GaLore and APOLLO."""


@dataclass(frozen=True)
class Peer:
    """An optimizer that Flora is compared with.

    Attributes:
        module: Where it is imported from.
        name: Its class.
        options: Arguments beside the groups and the learning rate.
        matrix_options: Options of the groups of two-dimensional hidden matrices, which it compresses.
        ranked: Whether those include ``rank``.
    """

    module: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    matrix_options: Mapping[str, Any] = field(default_factory=dict)
    ranked: bool = False

    def load(self) -> None:
        """Import the package.

        Raises:
            ImportError: It is not installed; the message names the extra.
        """
        require(self.module, "plan")

    def arguments(
        self, groups: Iterable[Mapping[str, Any]], lr: float, rank: int = 128
    ) -> tuple[type[Optimizer], dict[str, Any]]:
        """Return the class and its arguments.

        Args:
            groups: Parameter groups with a ``kind``; parameters alone, or with their names.
            lr: Learning rate of groups without one.
            rank: Of compressed matrices.
        """
        kind: type[Optimizer] = getattr(require(self.module, "plan"), self.name)
        matrix_options = {**self.matrix_options, **({"rank": rank} if self.ranked else {})}
        params = list(_split(groups, matrix_options)) if matrix_options else list(groups)
        return kind, {"params": params, "lr": lr, **self.options}

    def optimizer(self, groups: Iterable[Mapping[str, Any]], lr: float, rank: int = 128) -> Optimizer:
        """Construct the optimizer. See :meth:`arguments`."""
        kind, arguments = self.arguments(groups, lr, rank)
        return kind(**arguments)


_PROJECTED: Final = {"update_proj_gap": PROJECTION_GAP, "proj_type": "std"}
_APOLLO: Final = {**_PROJECTED, "proj": "random"}

PEERS: Final = {
    "adamw": Peer("torch.optim", "AdamW", {"fused": True}),
    "adamw-8bit": Peer("bitsandbytes.optim", "AdamW8bit"),
    "adamw-8bit-torchao": Peer("torchao.optim", "AdamW8bit"),
    # With momentum, and learning rates on AdamW's scale.
    "adafactor": Peer(
        "transformers.optimization", "Adafactor", {"beta1": 0.9, "scale_parameter": False, "relative_step": False}
    ),
    "galore": Peer(
        "galore_torch", "GaLoreAdamW", {"no_deprecation_warning": True}, {**_PROJECTED, "scale": 0.25}, ranked=True
    ),
    "apollo": Peer(
        "apollo_torch", "APOLLOAdamW", matrix_options={**_APOLLO, "scale_type": "channel", "scale": 1}, ranked=True
    ),
    "apollo-mini": Peer(
        "apollo_torch", "APOLLOAdamW", matrix_options={**_APOLLO, "scale_type": "tensor", "scale": 128, "rank": 1}
    ),
}


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Return a model with LoRA's adapters of a rank on all linear layers, the only parameters that are trained."""
    peft = require("peft", "plan")
    with warnings.catch_warnings():
        # It tells that a layer of GPT-2 stores its matrix transposed, and takes care of it itself.
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        adapted: nn.Module = peft.get_peft_model(
            model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        )
    return adapted


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """Every tensor that an optimizer keeps between steps, GaLore's projections too."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                yield value
            elif hasattr(value, "ortho_matrix"):
                yield value.ortho_matrix


def _split(groups: Iterable[Mapping[str, Any]], options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give two-dimensional hidden matrices groups of their own, with options."""
    for group in groups:
        flat = [each for each in group["params"] if group["kind"] == "matrix" and _tensor(each).dim() == 2]
        chosen = {id(each) for each in flat}
        others = [each for each in group["params"] if id(each) not in chosen]
        yield from ({**group, "params": flat, **options} for _ in flat[:1])
        yield from ({**group, "params": others} for _ in others[:1])


def _tensor(param: Any) -> Tensor:
    found: Tensor = param[1] if isinstance(param, tuple) else param
    return found
