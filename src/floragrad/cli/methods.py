"""The methods of ``floragrad train --optimizer`` and ``floragrad compare --methods``, by name.

A method is Flora with some of its options fixed, or an optimizer of :data:`floragrad.cli.peers.PEERS`. This table
imports no framework, so that the command line can list it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

EMBEDDING_LR: Final = 1e-2
"""Default learning rate of the embedding and the output head of a new model, with every method."""
_MOMENTUM: Final = frozenset({"rank", "ratio", "kappa", "projection", "residual", "state_dtype"})
"""Options of Flora's momentum."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train a model.

    Attributes:
        lr: Default learning rate of the hidden matrices of a new model.
        flora: Options of Flora that define the method; None for another optimizer.
        idle: Options of Flora that have no effect beside those.
        peer: Key of :data:`floragrad.cli.peers.PEERS`; empty for Flora.
        ranked: Whether ``rank`` belongs to it.
        adapters: Whether it trains adapters of the hidden matrices instead of them.
    """

    lr: float = 1e-3
    flora: Mapping[str, Any] | None = None
    idle: frozenset[str] = field(default_factory=frozenset)
    peer: str = ""
    ranked: bool = False
    adapters: bool = False

    @property
    def is_flora(self) -> bool:
        """Whether Flora trains."""
        return self.flora is not None

    @property
    def remedy(self) -> str:
        """The command that installs the method's package; empty where it is installed."""
        from floragrad.cli.peers import PEERS

        return PEERS[self.peer].remedy if self.peer else ""

    def takes(self, option: str) -> bool:
        """Return whether an option of Flora can be chosen: it is neither fixed nor without effect."""
        if option == "rank" and self.ranked:
            return True
        return self.flora is not None and option not in self.flora and option not in self.idle


METHODS: Final[dict[str, Method]] = {
    "flora": Method(flora={}),
    # The estimator and storage of the Flora paper (arXiv 2402.03293), with its interval.
    "flora-paper": Method(
        flora={
            "projection": "gaussian",
            "residual": False,
            "state_dtype": "float32",
            "kappa": 1000,
            "embedding_momentum": "compressed",
        }
    ),
    "flora-full": Method(flora={"ratio": 1, "state_dtype": "float32"}, idle=_MOMENTUM - {"ratio", "state_dtype"}),
    "flora-none": Method(flora={"beta1": None, "ratio": 1}, idle=_MOMENTUM | {"embedding_momentum"}),
    **{name: Method(peer=name) for name in ("adamw", "adamw-95", "adamw-8bit")},
    **{name: Method(peer=name) for name in ("adamw-8bit-torchao", "adamw-4bit-torchao")},
    **{name: Method(peer=name) for name in ("adafactor", "adafactor-none", "muon")},
    # galore-torch and apollo-torch recommend 1e-2 for their scales.
    "galore": Method(lr=1e-2, peer="galore", ranked=True),
    "apollo": Method(lr=1e-2, peer="apollo", ranked=True),
    "apollo-mini": Method(lr=1e-2, peer="apollo-mini"),
    "gefen": Method(peer="gefen"),
    # 0.02 is multiplied by alpha = 0.05.
    "racs": Method(lr=2e-2, peer="racs"),
    "sinkgd": Method(peer="sinkgd"),
    "scale": Method(peer="scale"),
    # Ten times the rate of the whole matrices.
    "lora": Method(lr=1e-2, peer="adamw", ranked=True, adapters=True),
    "lora-adafactor": Method(lr=1e-2, peer="adafactor", ranked=True, adapters=True),
    "lora-adafactor-none": Method(lr=1e-2, peer="adafactor-none", ranked=True, adapters=True),
}
DEFAULT_METHODS: Final = ("flora", "adamw", "adafactor")
"""What ``floragrad compare`` runs, and ``--backend jax`` knows."""
