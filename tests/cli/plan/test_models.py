"""From what a user gives to a model and its inputs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    DeiTConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    SiglipConfig,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    ViTConfig,
)

from floragrad.cli.errors import UserError
from floragrad.cli.plan import models
from floragrad.cli.plan.models import find_model, planned_model

KINDS = {
    "gpt2": "causal language model",
    "llama-60m": "causal language model",
    "mixtral-8x7b": "causal language model",
    "t5-small": "sequence-to-sequence model",
    "vit-b-16": "image classifier",
}

IMAGES = {"image_size": 32, "patch_size": 16}
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SMALL = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64),
    "llama": LlamaConfig(**WIDTH, vocab_size=64, num_key_value_heads=1),
    "mixtral": MixtralConfig(**WIDTH, vocab_size=64, num_key_value_heads=1, num_local_experts=2),
    "t5": T5Config(d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0),
    "vit": ViTConfig(**WIDTH, image_size=32),
    "deit": DeiTConfig(**WIDTH, **IMAGES),
}


PROPHET = ProphetNetConfig(hidden_size=32, num_encoder_layers=3, num_decoder_layers=3, vocab_size=64)


@pytest.mark.parametrize("name", KINDS)
def test_presets_are_of_their_kind(name: str) -> None:
    model = find_model(name)
    assert model.task == KINDS[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SMALL)
def test_a_batch_goes_through_and_every_weight_gets_a_gradient(kind: str, dtype: torch.dtype) -> None:
    model = planned_model(SMALL[kind], kind)
    built = model.build(dtype)
    output = built(**model.inputs(2, 8, dtype))
    output.loss.backward()
    assert built.training
    assert output.logits.shape[0] == 2
    assert output.get("past_key_values") is None, "a cache is no part of training"
    assert {parameter.dtype for parameter in built.parameters()} == {dtype}
    assert {name for name, parameter in built.named_parameters() if parameter.grad is None} == set()


def test_experts_in_float32_are_refused() -> None:
    with torch.device("meta"), pytest.raises(UserError, match="give --dtype bfloat16"):
        planned_model(SMALL["mixtral"], "it").build(torch.float32)


@pytest.mark.parametrize(
    ("config", "built"),
    [
        (Gemma2Config(num_hidden_layers=4, hidden_size=32, intermediate_size=64, vocab_size=64), Gemma2ForCausalLM),
        (BartConfig(encoder_layers=2, decoder_layers=3, d_model=32, vocab_size=64), BartForConditionalGeneration),
        (SwinConfig(depths=[2, 2, 6, 2]), SwinForImageClassification),
        (PROPHET, ProphetNetForConditionalGeneration),
    ],
    ids=["attention of two kinds", "a deeper decoder", "stages", "a depth without a setter"],
)
def test_any_model_of_a_known_task_is_built(config: Any, built: Any) -> None:
    with torch.device("meta"):
        whole, found = built(config), planned_model(config, "model").build(torch.bfloat16)
    assert [param.shape for param in found.parameters()] == [param.shape for param in whole.parameters()]


@pytest.mark.parametrize("suffix", ["", "config.json"], ids=["folder", "file"])
def test_a_configuration_on_disk_is_read(tmp_path: Path, suffix: str) -> None:
    GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=64, vocab_size=100).save_pretrained(tmp_path)
    model = find_model(str(tmp_path / suffix))
    assert (model.task, model.config.n_layer, model.positions) == ("causal language model", 3, 64)
    assert model.config.n_embd == 32


def test_the_users_configuration_is_left_as_it_was() -> None:
    config = GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=50)
    before = config.to_dict()
    planned_model(config, "model").build(torch.float32)
    assert config.to_dict() == before


def test_weights_are_drawn_where_they_are_real() -> None:
    """Uninitialised memory may hold NaN, and an SVD or a clipping then fails."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    weights = planned_model(config, "model").build(torch.float32).transformer.wte.weight
    assert 0.015 < weights.std().item() < 0.025, "0.02 is GPT-2's; 1,600 numbers are within 0.0004 of it on average"


def test_images_have_the_size_and_dtype_that_the_model_reads() -> None:
    inputs = find_model("vit-b-16").inputs(3, 1024, torch.bfloat16)
    assert inputs["pixel_values"].shape == (3, 3, 224, 224)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["labels"].shape == (3,)


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("gpt2", None, 1024),
        ("gpt2", 17, 17),
        ("llama-3-8b", None, 1024),
        ("t5-small", 4096, 4096),
        ("t5-small", None, 1024),
        ("vit-b-16", None, 1024),
    ],
)
def test_the_sequence_is_as_asked_or_as_long_as_usual(name: str, asked: int | None, expected: int) -> None:
    assert find_model(name).sequence(asked) == expected


def test_a_model_of_few_positions_is_given_all_of_them() -> None:
    assert planned_model(GPT2Config(n_positions=64), "model").sequence(None) == 64


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        (
            "gpt2",
            1025,
            "--sequence-length 1025 is more than the 1024 positions of MODEL gpt2: give at most 1024",
        ),
        ("vit-b-16", 8, "--sequence-length 8 belongs to models of text, and MODEL vit-b-16 reads images: leave it out"),
    ],
)
def test_a_sequence_that_is_not_read_is_refused(name: str, asked: int, message: str) -> None:
    with pytest.raises(UserError) as refused:
        find_model(name).sequence(asked)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("name", "asked", "sketched", "expected"),
    [
        ("gpt2", None, True, 128),
        ("gpt2", 384, True, 384),
        ("gpt2", 768, False, 768),
        ("llama-60m", None, True, 128),
        ("vit-b-16", 1, True, 1),
    ],
)
def test_the_rank_is_as_asked_or_the_librarys(name: str, asked: int | None, sketched: bool, expected: int) -> None:
    assert find_model(name).rank(asked, sketched) == expected


def test_a_small_model_has_a_quarter_of_its_width_as_rank() -> None:
    """At the library's rank of 128 Flora would sketch nothing, and warn."""
    assert planned_model(SMALL["llama"], "llama").rank(None, True) == 8


@pytest.mark.parametrize(
    ("rank", "sketched", "end"),
    [
        (385, True, "768, and a sketch needs half of it or less: give at most 384"),
        (769, False, "768: give at most 768"),
    ],
)
def test_a_rank_that_is_too_large_is_refused(rank: int, sketched: bool, end: str) -> None:
    with pytest.raises(UserError) as refused:
        find_model("gpt2").rank(rank, sketched)
    assert str(refused.value) == (
        f"--rank {rank} is too large for MODEL gpt2: the largest smaller side of its hidden matrices is {end}"
    )


@pytest.mark.parametrize("content", [None, {}, {"model_type": "no-such-type"}, "no json"], ids=str)
def test_what_is_no_model_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match="is unknown: give a preset"):
        find_model(str(path))


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"MODEL it is a wav2vec2, which is none of .*: causal language model, sequence"
    ):
        planned_model(AutoConfig.for_model("wav2vec2"), "it")


@pytest.mark.parametrize("kind", [CLIPConfig, SiglipConfig])
def test_the_images_of_a_model_of_images_and_text_are_those_of_its_vision(kind: Any) -> None:
    config = kind(vision_config={**WIDTH, **IMAGES, "num_channels": 1}, text_config={**WIDTH, "vocab_size": 64})
    model = planned_model(config, "it")
    inputs = model.inputs(2, 8, torch.float32)
    assert inputs["pixel_values"].shape == (2, 1, 32, 32)
    assert model.build(torch.float32)(**inputs).loss.isfinite()


@pytest.mark.parametrize("kind", ["imagegpt", "siglip2", "shieldgemma2"])
def test_an_image_classifier_that_reads_something_else_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"^MODEL it is a {kind}, which does not read images alone"):
        planned_model(AutoConfig.for_model(kind), "it")


def test_a_model_that_needs_a_missing_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_arguments: Any, **_options: Any) -> None:
        raise ImportError("\nIt requires the natten library\nbut it was not found.")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_config", missing)
    with pytest.raises(UserError, match=r"^MODEL it cannot be built: It requires the natten library but it was not"):
        planned_model(SMALL["llama"], "it").build(torch.float32)
