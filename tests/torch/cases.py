"""The table of cases: a new variant is one more row, and gets every test that runs over the table."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

KAPPA = 10
STEPS = 25  # two resamplings, at 10 and 20


@dataclass(frozen=True)
class Case:
    """One tensor and the options to train it with.

    Attributes:
        name: The test's id.
        shape: The tensor's shape.
        options: Of the constructor.
        bound: What the loss of ``test_convergence`` must fall below, in units of its start.
    """

    name: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    bound: float = 1e-3

    def __str__(self) -> str:
        return self.name

    def all_options(self, **changes: Any) -> dict[str, Any]:
        return {"lr": 1e-2, "kappa": KAPPA, "state_dtype": "float32"} | self.options | changes

    def parameter(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Parameter:
        generator = torch.Generator().manual_seed(seed)
        return torch.nn.Parameter(torch.randn(self.shape, generator=generator).to(dtype))

    def gradients(self, steps: int = STEPS, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        """Gradients with structure: rows, columns and steps of different size, and something that stays."""
        generator = torch.Generator().manual_seed(1)
        steady = torch.randn(self.shape, generator=generator)
        made = []
        for step in range(steps):
            fresh = torch.randn(self.shape, generator=generator)
            scale = torch.rand(self.shape[-1:] or (1,), generator=generator) + 0.1
            grad = (steady + fresh) * scale.reshape(self.shape[-1:]) * (1 + step % 3)
            made.append(grad.to(dtype))
        return made


SHAPES = [
    Case("wide", (16, 48), {"rank": 8}, bound=0.00702),
    Case("tall", (48, 16), {"rank": 4}, bound=0.0062),
    Case("ratio-2", (24, 40), {"ratio": 2}, bound=0.00608),
    Case("ratio-24", (32, 96), {"ratio": 24}, bound=0.00387),
    Case("k-does-not-divide-n", (24, 37), {"ratio": 5}, bound=0.00579),
    Case("fewer-slices-than-ratio", (24, 10), {"ratio": 7}, bound=0.00618),
    Case("one-bucket", (12, 9), {"ratio": 100}, bound=0.00341),
    Case("ratio-1", (24, 40), {"ratio": 1}, bound=0.00254),
    Case("convolution", (16, 3, 3, 3), {"rank": 4}, bound=0.00515),
    Case("stacked-experts", (3, 16, 40), {"rank": 4}, bound=0.00476),
    Case("stacked-twice", (2, 2, 12, 33), {"ratio": 4}, bound=0.00506),
    Case("vector", (40,), {}, bound=0.00806),
    Case("scalar", (), {}, bound=0.000487),
    Case("vocabulary", (8200, 8), {"rank": 4}, bound=0.00402),
    Case("vocabulary-full", (8200, 8), {"rank": 4, "embedding_momentum": "full"}, bound=0.00126),
    Case("vocabulary-compressed", (8200, 8), {"rank": 4, "embedding_momentum": "compressed"}, bound=0.00581),
]

OPTIONS = [
    Case("paper-estimator", (24, 37), {"ratio": 4, "residual": False}, bound=0.35),
    Case("adaptive", (24, 40), {"ratio": 4, "projection": "adaptive"}, bound=0.00391),
    Case("adaptive-k-does-not-divide-n", (24, 37), {"ratio": 5, "projection": "adaptive"}, bound=0.00413),
    Case("adaptive-experts", (3, 16, 34), {"ratio": 4, "projection": "adaptive"}, bound=0.00333),
    Case("gaussian", (24, 40), {"ratio": 4, "projection": "gaussian"}, bound=0.949),
    Case("gaussian-experts", (3, 16, 40), {"ratio": 4, "projection": "gaussian"}, bound=0.573),
    Case(
        "gaussian-wide",
        (6, 40),
        {"ratio": 2, "projection": "gaussian", "embedding_momentum": "compressed"},
        bound=0.144,
    ),
    Case("no-momentum", (24, 40), {"ratio": 4, "beta1": None}, bound=0.00406),
    Case("beta1-zero", (24, 40), {"ratio": 4, "beta1": 0}, bound=0.00406),
    Case("full-second-moment", (24, 40), {"ratio": 4, "factorize_second_moment": False}, bound=0.0134),
    Case("weight-decay", (24, 40), {"ratio": 4, "weight_decay": 0.1}, bound=0.0402),
    Case("scale-parameter", (24, 40), {"ratio": 4, "scale_parameter": True, "weight_decay": 0.1}, bound=0.0393),
    Case("relative-step", (24, 40), {"ratio": 4, "lr": None, "relative_step": True}, bound=0.00558),
    Case("warmup-init", (24, 40), {"ratio": 4, "lr": None, "relative_step": True, "warmup_init": True}, bound=0.0618),
    Case("tight-clip", (24, 40), {"ratio": 4, "clip_threshold": 0.3}, bound=0.13),
    Case("no-clip", (24, 40), {"ratio": 4, "clip_threshold": float("inf")}, bound=0.00558),
    Case("decay-rate", (24, 40), {"ratio": 4, "decay_rate": -0.5}, bound=0.00558),
    Case("large-eps", (24, 40), {"ratio": 4, "eps": (1e-2, 1e-1), "scale_parameter": True}, bound=0.0047),
    Case("kappa-1", (24, 40), {"ratio": 4, "kappa": 1}, bound=0.0276),
]

CASES = SHAPES + OPTIONS


def cases(quick: Collection[str]) -> list[Any]:
    """All rows for ``parametrize``; those that are not named run with ``make test-slow`` only."""
    assert {case.name for case in CASES} >= set(quick)
    return [case if case.name in quick else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
