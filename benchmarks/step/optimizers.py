"""The optimizers that take part: a table with a row for each, how it is made as its users make it.

A peer's package is imported where its row makes it, so that one which is missing or broken is an error of its row.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from floragrad import Flora

LR: Final = 1e-4
RANK: Final = 128
GAP: Final = 200
"""GaLore's and APOLLO's steps between two projections."""
SHORT_EPOCH: Final = 4
"""The same for those whose epochs are timed."""
RANKS: Final = (16, 32, 64, 128, 256)

Group = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        make: From groups of parameters with a ``kind`` to what is stepped, in order.
        held: Bytes of state and temporaries for each number of a float32 model, roughly and rather too many: for
            batches that fit into memory.
        environment: Variables of its process.
        is_compiled: Whether its step goes through ``torch.compile``, which hides what it holds and needs a compiler.
        opens: For one with short epochs: which of its steps, counted from 1, open one.
        is_variant: Whether it is timed for the goals only, not on every model.
        note: What to know beside its name.
    """

    make: Callable[[list[Group]], list[Any]]
    held: float
    environment: Mapping[str, str] = field(default_factory=dict)
    is_compiled: bool = False
    opens: Callable[[int], bool] | None = None
    is_variant: bool = False
    note: str = ""


def tensors_of(groups: list[Group]) -> list[Tensor]:
    """The parameters, in order."""
    return [param for group in groups for param in group["params"]]


class Copy:
    """No optimizer: moves as many bytes as a step must, which reads gradient and parameter and writes the parameter."""

    def __init__(self, groups: list[Group]) -> None:
        params = tensors_of(groups)
        half = sum(param.numel() for param in params) * 3 // 2
        self.state: Mapping[Any, Any] = {}
        self._source = torch.ones(half, dtype=params[0].dtype)
        self._target = torch.zeros_like(self._source)

    def step(self) -> None:
        """Read half of the bytes, write the other half."""
        self._target.copy_(self._source)


def _torch(name: str, **options: Any) -> Callable[[list[Group]], list[Any]]:
    return lambda groups: [getattr(torch.optim, name)(groups, lr=LR, **options)]


def _muon(groups: list[Group]) -> list[Any]:
    """Hidden matrices only, as its documentation says; AdamW for the rest."""
    hidden = [param for group in groups if group["kind"] == "matrix" for param in group["params"] if param.dim() == 2]
    chosen = set(hidden)
    rest = [param for param in tensors_of(groups) if param not in chosen]
    return [torch.optim.Muon(hidden, lr=LR), torch.optim.AdamW(rest, lr=LR, fused=True)]


def _hugging_face(groups: list[Group], beta1: float | None) -> list[Any]:
    from transformers.optimization import Adafactor

    return [Adafactor(groups, lr=LR, beta1=beta1, scale_parameter=False, relative_step=False)]


def _flora_opt(groups: list[Group], rank: int) -> list[Any]:
    from flora_opt.optimizers.torch.flora import Flora as Official

    return [Official(groups, lr=LR, rank=rank, beta1=0.9)]


def _with_matrices(groups: list[Group], options: dict[str, Any]) -> Iterator[Group]:
    """The groups, with options for the matrices."""
    for group in groups:
        yield {**group, **options} if group["kind"] == "matrix" else group


def _galore(groups: list[Group], gap: int) -> list[Any]:
    from galore_torch import GaLoreAdamW

    options = {"rank": RANK, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    return [GaLoreAdamW(list(_with_matrices(groups, options)), lr=LR, no_deprecation_warning=True)]


def _apollo(groups: list[Group], **options: Any) -> list[Any]:
    from apollo_torch import APOLLOAdamW

    options |= {"proj": "random", "update_proj_gap": GAP, "proj_type": "std"}
    return [APOLLOAdamW(list(_with_matrices(groups, options)), lr=LR)]


def _bitsandbytes(groups: list[Group]) -> list[Any]:
    from bitsandbytes.optim import AdamW8bit

    return [AdamW8bit(groups, lr=LR)]


def _torchao(groups: list[Group]) -> list[Any]:
    from torchao.optim import AdamW8bit

    return [AdamW8bit(groups, lr=LR)]


def _flora(**options: Any) -> Callable[[list[Group]], list[Any]]:
    return lambda groups: [Flora(groups, lr=LR, **options)]


def _ways(name: str, held: float, options: dict[str, Any], **more: Any) -> dict[str, Entry]:
    """One choice of Flora's options, stepped in both its ways."""
    without = {"FLORAGRAD_KERNELS": "eager"}
    return {
        name: Entry(_flora(**options), held, **more),
        f"{name}, eager": Entry(_flora(**options), held, without, **more),
    }


FUSED: Final = "torch AdamW, fused"
"""What every time is a ratio to."""
COPY: Final = "copy of as many bytes"
TORCH_ADAFACTOR: Final = "torch Adafactor"
HF_ADAFACTOR: Final = "Hugging Face Adafactor"
HF_MOMENTUM: Final = "Hugging Face Adafactor, momentum"
FLORA_OPT: Final = f"flora-opt, momentum, rank {RANK}"
INT8: Final = "floragrad Flora, int8"
FLOAT32: Final = "floragrad Flora, float32"
ADAPTIVE: Final = "floragrad Flora, int8, adaptive"

_PEERS: dict[str, Entry] = {
    COPY: Entry(lambda groups: [Copy(groups)], 12, note="half of the bytes read, half written"),
    "torch SGD, fused": Entry(_torch("SGD", fused=True), 0, note="no state: gradient and parameter read, one written"),
    FUSED: Entry(_torch("AdamW", fused=True), 8),
    "torch AdamW, foreach": Entry(_torch("AdamW", foreach=True), 20),
    "torch AdamW, loop": Entry(_torch("AdamW", foreach=False), 8),
    TORCH_ADAFACTOR: Entry(_torch("Adafactor"), 1, note="no momentum"),
    HF_ADAFACTOR: Entry(partial(_hugging_face, beta1=None), 1, note="no momentum"),
    HF_MOMENTUM: Entry(partial(_hugging_face, beta1=0.9), 5),
    FLORA_OPT: Entry(partial(_flora_opt, rank=RANK), 5, note="kappa 1000, its default"),
    f"galore-torch AdamW, rank {RANK}": Entry(partial(_galore, gap=GAP), 8, note=f"a projection every {GAP} steps"),
    f"apollo-torch APOLLO, rank {RANK}": Entry(partial(_apollo, rank=RANK, scale_type="channel", scale=1), 8),
    "apollo-torch APOLLO-Mini": Entry(partial(_apollo, rank=1, scale_type="tensor", scale=128), 4, note="rank 1"),
    "bitsandbytes AdamW8bit": Entry(_bitsandbytes, 8),
    "torchao AdamW8bit": Entry(_torchao, 8, is_compiled=True, note="compiles itself"),
    "torch Muon": Entry(_muon, 8, note="for hidden matrices; fused AdamW for the rest"),
}

OURS: Final[dict[str, Entry]] = {
    **_ways(INT8, 2, {"state_dtype": "int8"}),
    **_ways(FLOAT32, 3, {"state_dtype": "float32"}),
    **_ways("floragrad Flora, bfloat16", 3, {"state_dtype": "bfloat16"}, is_variant=True),
    **_ways("floragrad Flora, int4", 2, {"state_dtype": "int4"}, is_variant=True),
    **_ways(ADAPTIVE, 2, {"projection": "adaptive", "kappa": 100}, is_variant=True, note="kappa 100"),
}
"""Flora as it is by default, in float32, and without the native kernel."""

ENTRIES: Final[dict[str, Entry]] = {**_PEERS, **OURS}
"""The rows of every table of step times."""


def _begins(step: int) -> bool:
    return step % SHORT_EPOCH == 0


EPOCHS: Final[dict[str, Entry]] = {
    f"{INT8}, short epochs": Entry(_flora(kappa=SHORT_EPOCH), 2, opens=_begins),
    f"{ADAPTIVE}, short epochs": Entry(_flora(kappa=SHORT_EPOCH, projection="adaptive"), 2, opens=_begins),
    f"galore-torch AdamW, rank {RANK}, short epochs": Entry(
        partial(_galore, gap=SHORT_EPOCH),
        8,
        # It counts from 0: the first step, and every fourth from there.
        opens=lambda step: (step - 1) % SHORT_EPOCH == 0,
    ),
}
"""Those whose projections change, changing them every fourth step."""


def at_rank(name: str, rank: int) -> str:
    """The row of an optimizer at some rank."""
    return f"{name}, rank {rank}"


FLORA_OPT_RANKED: Final = "flora-opt, momentum"
RANKED: Final = (INT8, FLOAT32, FLORA_OPT_RANKED)
"""The optimizers whose growth over the rank is shown."""
GROWING: Final[dict[str, Entry]] = {
    **{at_rank(INT8, rank): Entry(_flora(rank=rank), 3) for rank in RANKS},
    **{at_rank(FLOAT32, rank): Entry(_flora(rank=rank, state_dtype="float32"), 4) for rank in RANKS},
    **{at_rank(FLORA_OPT_RANKED, rank): Entry(partial(_flora_opt, rank=rank), 6) for rank in RANKS},
}

ALL: Final[dict[str, Entry]] = {**GROWING, **EPOCHS, **ENTRIES}
