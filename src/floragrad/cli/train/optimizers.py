"""The optimizers of ``--optimizer``, all on the same parameter groups, and the bytes that they keep."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from floragrad import Flora, param_groups
from floragrad.cli.methods import METHODS
from floragrad.cli.peers import HIDDEN, PEERS, split_hidden, stored_bytes, with_adapters
from floragrad.cli.train import defaults
from floragrad.cli.train.config import RunConfig
from floragrad.torch import report
from floragrad.torch.distributed.collectives import to_local

Groups: TypeAlias = Sequence[dict[str, Any]]
Make: TypeAlias = Callable[[Groups], Optimizer]


def optimizer_class(config: RunConfig, model: nn.Module) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the optimizer's class and its arguments, as the Trainer takes them."""
    groups = param_groups(model, lr=config.lr, embedding_lr=config.embedding_lr, weight_decay=config.weight_decay)
    shared = config.vocabulary == "shared"
    if shared:
        vector_lr = defaults.lr({"model": config.model, "task": config.task})
        groups = [{**group, "lr": vector_lr} if group["kind"] == "vector" else group for group in groups]
    # Nothing of these is projected; the ratio says so, and any other would be warned of.
    rest: dict[str, Any] = {"ratio": 1, "seed": config.seed}
    method = METHODS[config.optimizer]
    if method.is_flora:
        options = config.keywords("optimizer")
        if not shared:
            return Flora, {"params": groups, "lr": config.lr, **options}
        chosen = [{**group, **options} if group["kind"] in HIDDEN else group for group in groups]
        return Flora, {"params": chosen, "lr": config.lr, **rest}
    peer = PEERS[method.peer]
    rank = {} if config.rank is None else {"rank": config.rank}
    together = not shared and not peer.hidden_only
    if together and not peer.regroups:
        return peer.arguments(groups, config.lr, **rank)

    def train_hidden(part: Groups) -> Optimizer:
        return peer.optimizer(part, config.lr, **rank)

    def train_rest(part: Groups) -> Optimizer:
        return Flora(part, lr=config.lr, **rest) if shared else PEERS["adamw"].optimizer(part, config.lr)

    divided = (groups, []) if together else split_hidden(groups, flat=peer.hidden_only)
    parts = zip(divided, (train_hidden, train_rest), strict=True)
    params, makes = zip(*((part, make) for part, make in parts if part), strict=True)
    return CombinedOptimizer, {"params": params, "makes": makes}


def state_bytes(optimizer: Optimizer, kinds: Sequence[str] = ()) -> int:
    """Measure the bytes of the optimizer's state of some kinds of parameters, or of all, in this process."""
    groups = [group for group in optimizer.param_groups if not kinds or group["kind"] in kinds]
    params = [param for group in groups for param in group["params"]]
    apart = [tensor for param in params for tensor in (param, param.grad) if tensor is not None]
    states = optimizer.state
    return stored_bytes([states[param] for param in params if param in states], map(to_local, apart))


def gradient_bytes(optimizer: Optimizer) -> int:
    """Bytes of one gradient of every parameter, in this process."""
    return sum(p.numel() * p.element_size() for p in _parameters(optimizer))


def accumulation_bytes(config: RunConfig, optimizer: Any) -> int:
    """Return the bytes of the gradients of a window's earlier micro-batches.

    ``optimizer`` is as the Trainer has prepared it.
    """
    if config.accumulator == "flora":
        return int(optimizer.window.report().state_bytes)
    return gradient_bytes(optimizer) if config.micro_batches > 1 else 0


def adamw_bytes(optimizer: Optimizer) -> int:
    """Bytes that AdamW's state takes for the same parameters, in this process."""
    return sum(report.adamw_bytes(parameter.shape, parameter.dtype) for parameter in _parameters(optimizer))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return this process's part of every parameter."""
    return [to_local(parameter) for group in optimizer.param_groups for parameter in group["params"]]


def add_adapters(model: nn.Module, rank: int, *, others: bool) -> None:
    """Add LoRA's adapters to all linear layers but the head of one of transformers' models, in place.

    The layers' matrices are frozen; everything else is trained too if ``others``.
    """
    trained = [param for param in model.parameters() if param.requires_grad]
    with_adapters(model, rank, in_place=True)
    frozen = adapted_parameters(model)
    for param in trained:
        param.requires_grad_(others and param not in frozen)


def adapted_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the matrices that have adapters."""
    return {param for name, param in model.named_parameters() if name.endswith(".base_layer.weight")}


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the matrices of the adapters."""
    return {param for name, param in model.named_parameters() if ".lora_" in name}


class CombinedOptimizer(Optimizer):
    """Step several optimizers as one. Its groups are the parts' own, so that schedulers act on them.

    Args:
        params: The groups of each part, with their ``kind``.
        makes: The constructor of each part.
    """

    def __init__(self, params: Sequence[Groups], makes: Sequence[Make]) -> None:
        self.parts: list[Optimizer] = []
        super().__init__([{**group} for groups in params for group in groups], {})  # it changes the groups
        kinds = {param: group["kind"] for group in self.param_groups for param in group["params"]}
        self.parts = [make(groups) for make, groups in zip(makes, params, strict=True)]
        self._join()
        for group in self.param_groups:
            group.setdefault("kind", kinds[group["params"][0]])  # Gefen makes groups of its own

    def _join(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, Any]:
        """The state of every parameter, as its part keeps it."""
        return {param: state for part in self.parts for param, state in part.state.items()}

    @state.setter
    def state(self, _value: Any) -> None:
        """Ignore the empty state that the base class sets: the parts have theirs."""

    def step(self, closure: Any = None) -> Any:
        """Make a step of every part."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every part."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of every part."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._join()
