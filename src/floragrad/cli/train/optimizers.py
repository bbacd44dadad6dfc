"""The optimizers of ``--optimizer``, all on the same parameter groups, and the bytes that they keep."""

from collections.abc import Sequence
from typing import Any

import torch

from floragrad import Flora, param_groups
from floragrad.cli.combined import CombinedOptimizer, Groups
from floragrad.cli.methods import METHODS
from floragrad.cli.peers import HIDDEN, PEERS, split_hidden, stored_bytes
from floragrad.cli.train import defaults
from floragrad.cli.train.config import RunConfig
from floragrad.torch import report
from floragrad.torch.distributed.collectives import to_local


def optimizer_class(config: RunConfig, model: torch.nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
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

    def train_hidden(part: Groups) -> torch.optim.Optimizer:
        return peer.optimizer(part, config.lr, **rank)

    def train_rest(part: Groups) -> torch.optim.Optimizer:
        return Flora(part, lr=config.lr, **rest) if shared else PEERS["adamw"].optimizer(part, config.lr)

    divided = (groups, []) if together else split_hidden(groups, flat=peer.hidden_only)
    parts = zip(divided, (train_hidden, train_rest), strict=True)
    params, makes = zip(*((part, make) for part, make in parts if part), strict=True)
    return CombinedOptimizer, {"params": params, "makes": makes}


def state_bytes(optimizer: torch.optim.Optimizer, kinds: Sequence[str] = ()) -> int:
    """Measure the bytes of the optimizer's state of some kinds of parameters, or of all, in this process."""
    groups = [group for group in optimizer.param_groups if not kinds or group["kind"] in kinds]
    params = [param for group in groups for param in group["params"]]
    apart = [tensor for param in params for tensor in (param, param.grad) if tensor is not None]
    states = optimizer.state
    return stored_bytes([states[param] for param in params if param in states], map(to_local, apart))


def gradient_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of one gradient of every parameter, in this process."""
    return sum(p.numel() * p.element_size() for p in _parameters(optimizer))


def accumulation_bytes(config: RunConfig, optimizer: Any) -> int:
    """Return the bytes of the gradients of a window's earlier micro-batches.

    ``optimizer`` is as the Trainer has prepared it.
    """
    if config.accumulator == "flora":
        return int(optimizer.window.report().state_bytes)
    return gradient_bytes(optimizer) if config.micro_batches > 1 else 0


def adamw_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that AdamW's state takes for the same parameters, in this process."""
    return sum(report.adamw_bytes(parameter.shape, parameter.dtype) for parameter in _parameters(optimizer))


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return this process's part of every parameter."""
    return [to_local(parameter) for group in optimizer.param_groups for parameter in group["params"]]
