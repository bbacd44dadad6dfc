"""The optimizers of ``--optimizer``, all on the same parameter groups."""

from typing import Any

import torch

from floragrad import Flora, param_groups
from floragrad.cli.peers import PEERS, state_tensors
from floragrad.cli.train.config import RunConfig
from floragrad.torch import report
from floragrad.torch.distributed.collectives import to_local


def optimizer_class(config: RunConfig, model: torch.nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the optimizer's class and its arguments, as the Trainer takes them."""
    groups = param_groups(model, lr=config.lr, embedding_lr=config.embedding_lr, weight_decay=config.weight_decay)
    if config.optimizer == "flora":
        return Flora, {"params": groups, "lr": config.lr, **config.keywords("optimizer")}
    return PEERS[config.optimizer].arguments(groups, config.lr)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state in this process, measured from its tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in map(to_local, state_tensors(optimizer)))


def gradient_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of one gradient of every parameter, in this process."""
    return sum(p.numel() * p.element_size() for p in _parameters(optimizer))


def accumulation_bytes(config: RunConfig, optimizer: Any) -> int:
    """Bytes that the gradients of a window's earlier micro-batches take.

    Args:
        config: Of the run.
        optimizer: As the Trainer has prepared it.
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
