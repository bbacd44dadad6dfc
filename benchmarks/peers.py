"""Other optimizers by the names of the results, most of :mod:`floragrad.cli.peers`, and the bytes of state they keep.

Every peer is a function of parameter groups with a ``kind``, as :func:`floragrad.param_groups` makes them, and returns
the optimizers that are stepped, in order. A peer's package is imported when it is made.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from floragrad.cli import peers
from floragrad.cli.peers import Peer, stored_bytes

LR: Final = 1e-4
RANK: Final = 128

Group = dict[str, Any]
Make = Callable[[list[Group]], list[Any]]


class Copy:
    """No optimizer: copy as many bytes as a step reads (gradient, parameter) and writes (parameter)."""

    def __init__(self, groups: list[Group]) -> None:
        params = [param for group in groups for param in group["params"]]
        half = sum(param.numel() for param in params) * 3 // 2
        self.state: Mapping[Any, Any] = {}
        self._source = torch.ones(half, dtype=params[0].dtype, device=params[0].device)
        self._target = torch.zeros_like(self._source)

    def step(self) -> None:
        """Read half of the bytes and write the other half."""
        self._target.copy_(self._source)


def _make(peer: Peer) -> Make:
    return lambda groups: [peer.optimizer(groups, LR, RANK)]


def _torch(name: str, **options: Any) -> Make:
    return _make(Peer("torch.optim", name, options))


def _muon(groups: list[Group]) -> list[Any]:
    """Use Muon for hidden matrices, as its documentation says, and AdamW for the rest."""
    hidden = [param for group in groups if group["kind"] == "matrix" for param in group["params"] if param.dim() == 2]
    chosen = set(hidden)
    rest = [param for group in groups for param in group["params"] if param not in chosen]
    return [torch.optim.Muon(hidden, lr=LR), torch.optim.AdamW(rest, lr=LR, fused=True)]


FUSED: Final = "torch AdamW, fused"
"""The reference of all step times."""
COPY: Final = "copy of as many bytes"
TORCH_ADAFACTOR: Final = "torch Adafactor, no momentum"
HF_ADAFACTOR: Final = "Hugging Face Adafactor, no momentum"
FLORA_OPT: Final = f"flora-opt, momentum, rank {RANK}"
TORCHAO: Final = "torchao AdamW8bit"
BITSANDBYTES: Final = "bitsandbytes AdamW8bit"
APOLLO: Final = f"apollo-torch APOLLO, rank {RANK}"
GALORE: Final = f"galore-torch AdamW, rank {RANK}"
MUON: Final = "torch Muon, fused AdamW for the rest"
"""It multiplies in bfloat16, which takes minutes a step on a CPU without instructions for it."""

PEERS: Final[dict[str, Make]] = {
    COPY: lambda groups: [Copy(groups)],
    FUSED: _make(peers.PEERS["adamw"]),
    TORCH_ADAFACTOR: _torch("Adafactor"),
    HF_ADAFACTOR: _make(peers.PEERS["adafactor-none"]),
    FLORA_OPT: _make(Peer("flora_opt.optimizers.torch.flora", "Flora", {"rank": RANK, "beta1": 0.9})),
    "torch SGD, fused": _torch("SGD", fused=True),
    "torch AdamW, foreach": _torch("AdamW", foreach=True),
    "torch AdamW, loop": _torch("AdamW", foreach=False),
    "Hugging Face Adafactor, momentum": _make(peers.PEERS["adafactor"]),
    GALORE: _make(peers.PEERS["galore"]),
    APOLLO: _make(peers.PEERS["apollo"]),
    "apollo-torch APOLLO-Mini, rank 1": _make(peers.PEERS["apollo-mini"]),
    BITSANDBYTES: _make(peers.PEERS["adamw-8bit"]),
    TORCHAO: _make(peers.PEERS["adamw-8bit-torchao"]),
    MUON: _muon,
}
FLASH_OPTIM: Final = _make(Peer("flashoptim", "FlashAdamW"))
"""For GPUs only."""
FOR_GPUS: Final = (TORCHAO, BITSANDBYTES, APOLLO, GALORE, MUON, FLORA_OPT)
"""Peers that are timed on GPUs; Muon only there."""
PACKAGES: Final = (
    "floragrad",
    "torch",
    "transformers",
    "flora-opt",
    "galore-torch",
    "apollo-torch",
    "bitsandbytes",
    "torchao",
)


def state_bytes(optimizers: Iterable[Any], apart: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the storages that the states of optimizers lead to, each storage once.

    Args:
        optimizers: Objects with a ``state``.
        apart: Tensors that are not state, though a state may refer to them: parameters and gradients.
    """
    # A parameter is the key of its state.
    return stored_bytes([list(optimizer.state.values()) for optimizer in optimizers], apart)
