"""FSDP2: each process keeps a part of every tensor. Checkpoints hold whole ones, for any number of processes."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from floragrad import Flora
from floragrad.cli.errors import UserError
from floragrad.cli.train.processes import Processes


def shard(model: Any, processes: Processes) -> None:
    """Leave each process its part of every block of one of transformers' models, and of the modules outside them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise UserError(
            f"--fsdp divides a model block by block, and {type(model).__name__} does not name its blocks "
            "(_no_split_modules): leave --fsdp out"
        )
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (processes.size,))
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as one process saves them, on the leader; nothing on the others. All call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    # Gathered, tied weights are two tensors, which nothing would find to be the same.
    once, names = dict(model.named_parameters()), dict(model.named_parameters(remove_duplicate=False))
    return {name: value for name, value in whole.items() if name in once or name not in names}


def whole_state(optimizer: torch.optim.Optimizer, processes: Processes) -> dict[str, Any]:
    """Return the optimizer's state as one process has it, on the leader; nothing on the others. All call it."""
    saved = optimizer.state_dict()
    states = {}
    for index, state in saved["state"].items():
        whole = {key: _gathered(value, processes) for key, value in state.items()}
        if processes.leads:
            states[index] = whole
    return {**saved, "state": states} if processes.leads else {}


def load_state(optimizer: torch.optim.Optimizer, whole: dict[str, Any]) -> None:
    """Load a state of whole tensors; each process keeps its part. Flora cuts them itself."""
    if not isinstance(optimizer, Flora):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        states = {index: _cut(state, params[index]) for index, state in whole["state"].items()}
        whole = {**whole, "state": states}
    optimizer.load_state_dict(whole)


def _gathered(value: Any, processes: Processes) -> Any:
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if processes.leads else None


def _cut(state: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """Return a parameter's state with every tensor of its shape placed as it is."""
    if not isinstance(param, DTensor):
        return dict(state)
    mesh, placements = param.device_mesh, param.placements
    return {
        key: distribute_tensor(value, mesh, placements, src_data_rank=None)
        if isinstance(value, Tensor) and value.shape == param.shape
        else value
        for key, value in state.items()
    }
