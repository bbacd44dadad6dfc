"""Adapters of peft: which of their tensors Flora compresses, and what it says where it compresses none."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from floragrad.transformers import FloraFactory
from tests.integrations.test_transformers import llama


def adapted(**options: Any) -> tuple[torch.nn.Module, LoraConfig]:
    config = LoraConfig(**{"r": 8, "target_modules": "all-linear", **options})
    return get_peft_model(llama(), config), config


def kinds(word: str, **options: Any) -> set[str]:
    """Kinds of the parameters with a word in their name."""
    groups = FloraFactory()(adapted(**options)[0], lr=1e-3, rank=4).param_groups
    return {group["kind"] for group in groups for name in group["param_names"] if word in name}


def test_adapters_are_compressed_by_a_smaller_rank_and_the_base_model_has_no_state() -> None:
    model, config = adapted()
    optimizer = FloraFactory()(model, lr=1e-3, rank=4)
    report = optimizer.report()
    assert {row.name for row in report.rows} == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in row.name for row in report.rows)
    assert {(row.momentum, row.ratio) for row in report.rows} == {("sketch", config.r // 4)}
    assert len(optimizer.state) == report.compressed == 2 * 7 * 2  # two matrices for each of 7 layers in 2 blocks


def test_it_says_so_where_no_adapter_is_compressed() -> None:
    with pytest.warns(UserWarning, match="Flora compresses no momentum") as caught:
        optimizer = FloraFactory()(adapted()[0], lr=1e-3)
    (said,) = {str(each.message) for each in caught if each.category is UserWarning}
    for part in ("lora_A", "rank 128 > 8 // 2: every column kept", "a smaller rank", "ratio=1"):
        assert part in said
    assert optimizer.report().compressed == 0
    assert "0 of 28 tensors keep a sketch" in str(optimizer.report())


@pytest.mark.parametrize(
    ("word", "kind", "options"),
    [
        ("lora_A", "matrix", {"target_modules": ["q_proj", "lm_head"]}),
        ("lora_embedding_A", "matrix", {"target_modules": ["embed_tokens"]}),
        ("magnitude_vector", "vector", {"use_dora": True}),
        ("embed_tokens", "vocabulary", {"modules_to_save": ["embed_tokens"]}),
        ("lm_head", "vocabulary", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_kinds(word: str, kind: str, options: dict[str, Any]) -> None:
    assert kinds(word, **options) == {kind}
