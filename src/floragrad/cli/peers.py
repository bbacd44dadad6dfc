"""Other optimizers, set up as their users do: one table for ``floragrad train``, ``compare``, ``plan`` and benchmarks.

A peer takes parameter groups with a ``kind``, as :func:`floragrad.param_groups` makes them; its package is imported
when it is used.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, Final, TypeAlias

from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.serialization import add_safe_globals
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from floragrad._extras import require

Group: TypeAlias = dict[str, Any]
HIDDEN: Final = ("matrix", "convolution")
"""Kinds of hidden matrices."""
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
        hidden_only: Whether it takes two-dimensional hidden matrices only; AdamW trains the rest.
        regroups: Whether it makes groups of its own, without their ``kind``.
        extra: The extra of floragrad that installs its package.
        projector: Class of the objects in its state, in its module; ``torch.load`` must know it.
    """

    module: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    matrix_options: Mapping[str, Any] = field(default_factory=dict)
    ranked: bool = False
    hidden_only: bool = False
    regroups: bool = False
    extra: str = "plan"
    projector: str = ""

    def load(self) -> None:
        """Import the package, or raise an ImportError that names the extra."""
        require(self.module, self.extra)

    @property
    def package(self) -> str:
        """The package that it is imported from."""
        return self.module.partition(".")[0]

    @property
    def remedy(self) -> str:
        """The command that installs the package; empty where it is installed."""
        found = find_spec(self.package) is not None
        return "" if found else f"pip install 'floragrad[{self.extra}]'"

    def arguments(
        self, groups: Iterable[Mapping[str, Any]], lr: float, rank: int = 128
    ) -> tuple[type[Optimizer], dict[str, Any]]:
        """Return the class and its arguments.

        Args:
            groups: Parameter groups with a ``kind``; parameters alone, or with their names.
            lr: Learning rate of groups without one.
            rank: Of compressed matrices.
        """
        kind: type[Optimizer] = getattr(require(self.module, self.extra), self.name)
        if self.projector:
            add_safe_globals([attrgetter(self.projector)(require(self.module, self.extra))])
        matrix_options = {**self.matrix_options, **({"rank": rank} if self.ranked else {})}
        hidden, rest = split_hidden(groups, flat=True) if matrix_options else ([], [{**group} for group in groups])
        params = [*({**group, **matrix_options} for group in hidden), *rest]
        return kind, {"params": params, "lr": lr, **self.options}

    def optimizer(self, groups: Iterable[Mapping[str, Any]], lr: float, rank: int = 128) -> Optimizer:
        """Construct the optimizer. See :meth:`arguments`."""
        kind, arguments = self.arguments(groups, lr, rank)
        return kind(**arguments)


_PROJECTED: Final = {"update_proj_gap": PROJECTION_GAP, "proj_type": "std"}
_APOLLO: Final = {**_PROJECTED, "proj": "random"}

_FACTORED: Final = {"scale_parameter": False, "relative_step": False}
"""Learning rates on AdamW's scale."""

PEERS: Final = {
    "adamw": Peer("torch.optim", "AdamW", {"fused": True}),
    "adamw-95": Peer("torch.optim", "AdamW", {"fused": True, "betas": (0.9, 0.95)}),
    "adamw-8bit": Peer("bitsandbytes.optim", "AdamW8bit"),
    "adamw-8bit-torchao": Peer("torchao.optim", "AdamW8bit", extra="rivals"),
    "adamw-4bit-torchao": Peer("torchao.optim", "AdamW4bit", extra="rivals"),
    "adafactor": Peer("transformers.optimization", "Adafactor", {**_FACTORED, "beta1": 0.9}),
    "adafactor-none": Peer("transformers.optimization", "Adafactor", _FACTORED),
    # An update as large as AdamW's, so that its learning rates are AdamW's too.
    "muon": Peer("torch.optim", "Muon", {"adjust_lr_fn": "match_rms_adamw"}, hidden_only=True),
    "galore": Peer(
        "galore_torch",
        "GaLoreAdamW",
        {"no_deprecation_warning": True},
        {**_PROJECTED, "scale": 0.25},
        ranked=True,
        projector="galore_projector.GaLoreProjector",
    ),
    "apollo": Peer(
        "apollo_torch",
        "APOLLOAdamW",
        matrix_options={**_APOLLO, "scale_type": "channel", "scale": 1},
        ranked=True,
        extra="rivals",
        projector="random_projector.GradientProjector",
    ),
    "apollo-mini": Peer(
        "apollo_torch",
        "APOLLOAdamW",
        matrix_options={**_APOLLO, "scale_type": "tensor", "scale": 128, "rank": 1},
        extra="rivals",
        projector="random_projector.GradientProjector",
    ),
    "gefen": Peer("gefen", "Gefen", {"fused": False}, regroups=True, extra="rivals"),
    "racs": Peer("pytorch_optimizer", "RACS", hidden_only=True, extra="rivals"),
    "sinkgd": Peer("floragrad.cli.rivals", "SinkGD", hidden_only=True),
    "scale": Peer("floragrad.cli.rivals", "SCALE", hidden_only=True),
}


def with_adapters(model: nn.Module, rank: int, *, in_place: bool = False) -> nn.Module:
    """Return one of transformers' models with LoRA's adapters on all linear layers but the head, all that is trained.

    With ``in_place`` they are added to the model itself, not to peft's wrapper of it.
    """
    peft = require("peft", "plan")
    with warnings.catch_warnings():
        # It tells that a layer of GPT-2 stores its matrix transposed, and takes care of it itself.
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        adapt = peft.inject_adapter_in_model if in_place else peft.get_peft_model
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        adapted: nn.Module = adapt(model=model, peft_config=config)
    return adapted


def split_hidden(groups: Iterable[Mapping[str, Any]], *, flat: bool) -> tuple[list[Group], list[Group]]:
    """Return groups of the hidden matrices (those of two dimensions if ``flat``), and of everything else."""
    hidden: list[Group] = []
    rest: list[Group] = []
    for group in groups:
        wanted = group["kind"] in HIDDEN
        chosen = [each for each in group["params"] if wanted and (not flat or _tensor(each).dim() == 2)]
        known = {id(each) for each in chosen}
        others = [each for each in group["params"] if id(each) not in known]
        hidden += [{**group, "params": chosen}] if chosen else []
        rest += [{**group, "params": others}] if others else []
    return hidden, rest


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield every tensor that an optimizer keeps between steps, GaLore's projections too."""
    yield from _tensors(list(optimizer.state.values()), set())


def stored_bytes(value: Any, apart: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the storages that a value leads to, each storage once.

    Args:
        value: Mappings, sequences, objects with attributes (a projector with its matrix) and tensors that wrap others
            (codes with their scales) are searched.
        apart: Tensors whose storages do not count.
    """
    apart = list(apart)
    elsewhere = {tensor.untyped_storage().data_ptr() for tensor in apart}
    storages = [tensor.untyped_storage() for tensor in _tensors(value, {id(tensor) for tensor in apart})]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in sizes.items() if address not in elsewhere)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the plain tensors that a value leads to."""
    if id(value) in seen or isinstance(value, (type, Generator)):
        return
    seen.add(id(value))
    inside: Iterable[Any] = ()
    if isinstance(value, Tensor):
        if not is_traceable_wrapper_subclass(value):
            yield value
            return
        inside = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    elif isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, (list, tuple, set)):
        inside = value
    elif hasattr(value, "__dict__") and not callable(value):
        inside = vars(value).values()
    for each in inside:
        yield from _tensors(each, seen)


def _tensor(param: Any) -> Tensor:
    found: Tensor = param[1] if isinstance(param, tuple) else param
    return found
