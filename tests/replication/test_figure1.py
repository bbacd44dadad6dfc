"""Figure 1 on made-up images: its methods differ as the paper says, and the page holds every table."""

import pytest
import torch

from replication import figure1
from replication.figure1 import METHODS, RANK, WIDTH, Curve, Examples, distance, page, rank, train

STEPS = 4


@pytest.fixture(scope="module")
def curves() -> dict[str, list[Curve]]:
    """A few steps of every method."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, WIDTH, generator=generator, dtype=torch.float64)
    examples: Examples = inputs, torch.randint(10, (256,), generator=generator)
    return {name: [train(name, examples, examples, 0, STEPS)] for name in METHODS}


def test_lora_with_a_frozen_is_the_fixed_projection(curves: dict[str, list[Curve]]) -> None:
    change = {name: found[0].changes[STEPS] for name, found in curves.items()}
    # Both are sums of as many products in float64.
    assert distance(change["LoRA(B)"], change["RP"]) < STEPS * WIDTH * 2**-52
    assert 1e-6 < distance(change["LoRA"], change["RP"]) < 0.1
    assert distance(change["RRP"], change["RP"]) > 0.1


def test_resampling_gives_a_high_rank(curves: dict[str, list[Curve]]) -> None:
    ranks = {name: [rank(change) for change in found[0].changes.values()] for name, found in curves.items()}
    assert ranks["LoRA(B)"] == ranks["RP"] == [RANK, RANK]
    assert ranks["RRP"] == [RANK, STEPS * RANK]
    assert ranks["SGD"][-1] > 128


def test_the_page_has_every_method(curves: dict[str, list[Curve]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure1.harness, "environment", lambda _: ["- where"])
    text = "\n".join(page(curves, STEPS))
    assert all(text.count(f"| {name} |") >= 2 for name in METHODS)
    assert "step 4" in text
