"""A small Llama, trained as its users train: FSDP2 and DDP, clipping, mixed precision."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from floragrad import Flora, param_groups
from tests.distributed.cases import full
from tests.distributed.conftest import Worlds
from tests.marks import slow

STEPS = 25
TOLERANCE = 1e-5
BATCH = 4
MAX_NORM = 0.5


def llama(dtype: torch.dtype) -> nn.Module:
    """Two blocks; the vocabulary is too small for the aspect ratio to tell."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).to(dtype)


def batches(rank: int, size: int) -> list[Tensor]:
    """This rank's part of every global batch."""
    tokens = torch.randint(96, (1, BATCH, 16), generator=torch.Generator().manual_seed(1)).expand(STEPS, -1, -1)
    return list(tokens.unflatten(1, (size, BATCH // size))[:, rank])


def sharded(model: nn.Module, **policy: Any) -> nn.Module:
    """FSDP2 on every block and on the root."""
    for block in model.model.layers:  # type: ignore[attr-defined, union-attr]
        fully_shard(block, **policy)
    fully_shard(model, **policy)
    return model


def train(
    rank: int,
    size: int,
    wrap: Callable[[nn.Module], nn.Module],
    *,
    clip: bool = True,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[list[float], list[Tensor]]:
    """Losses of the global batch, and the parameters at the end, whole."""
    model = wrap(llama(dtype))
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = Flora(param_groups(plain, lr=2e-3, weight_decay=0.1), **{"rank": 8, "kappa": 3, **options})
    losses = []
    for tokens in batches(rank, size):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if size > 1:
            torch.distributed.all_reduce(mean)
        losses.append(mean.item() / size)
    return losses, [full(param).clone() for param in plain.parameters()]


@cache
def train_alone(**options: Any) -> tuple[list[float], list[Tensor]]:
    """The same in one process: once, whatever it is compared with."""
    return train(0, 1, lambda model: model, **options)


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {"fsdp": sharded, "ddp": DistributedDataParallel}
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"state_dtype": "float32"},
    "adaptive": {"state_dtype": "float32", "projection": "adaptive"},
    "not clipped": {"state_dtype": "float32", "clip": False},
}


def equals_one_process(rank: int, name: str, options: dict[str, Any]) -> None:
    """In float64 the gradients are the same but for their last bits, whoever sums them."""
    size = torch.distributed.get_world_size()
    losses, params = train(rank, size, WRAPPED[name], **options)
    whole_losses, whole = train_alone(**options)
    for param, other in zip(whole, params, strict=True):
        assert (param - other).abs().max() <= TOLERANCE * param.abs().max()
    assert max(abs(a - b) for a, b in zip(losses, whole_losses, strict=True)) <= TOLERANCE
    assert whole_losses[-1] < whole_losses[0] - 0.5


@pytest.mark.parametrize(
    ("name", "options"),
    [slow("fsdp", "float32"), ("fsdp", "adaptive"), ("ddp", "float32"), slow("ddp", "not clipped")],
)
def test_equals_one_process(worlds: Worlds, name: str, options: str) -> None:
    """The same batches on 2 processes and on one: the same parameters after 25 steps and eight epochs."""
    worlds(2).run(equals_one_process, name, OPTIONS[options])


def is_one_model(rank: int, name: str, options: dict[str, Any]) -> None:
    """Ranks agree bit for bit, and the loss falls as it does in one process, in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    wrap = (lambda model: sharded(model, mp_policy=policy)) if name == "fsdp" else WRAPPED[name]
    size = torch.distributed.get_world_size()
    losses, params = train(rank, size, wrap, dtype=torch.float32, **options)
    whole_losses, _ = train_alone(dtype=torch.float32)
    for param in params:
        least, most = param.clone(), param.clone()
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        assert torch.equal(least, most)
    assert abs(losses[-1] - whole_losses[-1]) <= 0.1 * whole_losses[-1]


@pytest.mark.parametrize(
    ("name", "options"),
    [slow("fsdp", {}), ("fsdp", {"state_dtype": "int4"}), ("ddp", {"state_dtype": "int4"})],
    ids=str,
)
def test_replicas_stay_one_model(worlds: Worlds, name: str, options: dict[str, Any]) -> None:
    """With few bits, and under mixed precision."""
    worlds(2).run(is_one_model, name, options)
