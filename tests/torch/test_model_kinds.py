"""Kinds of whole models: what is neither an embedding nor an output head is never vocabulary."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from floragrad import Flora, param_groups

DECODER: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2
}  # fmt: skip
VISION = ENCODER | {"image_size": 64, "patch_size": 32}
TEXT = ENCODER | {"vocab_size": 300, "max_position_embeddings": 16}


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: group["kind"] for group in param_groups(model, lr=1e-3) for name, _ in group["params"]}


@dataclass(frozen=True)
class Expected:
    """A model and the kinds of its tensors of two and more dimensions that are not ``"matrix"``.

    Attributes:
        model: The class of transformers.
        config: Of a small one.
        vocabulary: Names of embeddings and output heads.
        vector: Names of vectors.
        convolution: Names of kernels of 32 and more columns.
        matrix: Names of matrices that an aspect ratio would misjudge.
    """

    model: str
    config: Callable[[], Any]
    vocabulary: frozenset[str] = frozenset()
    vector: frozenset[str] = frozenset()
    convolution: frozenset[str] = frozenset()
    matrix: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.model


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


EXPECTED = [
    Expected(
        "MixtralForCausalLM",
        lambda: transformers.MixtralConfig(**DECODER, num_local_experts=4),
        vocabulary=names("model.embed_tokens.weight lm_head.weight"),
        matrix=names("model.layers.0.mlp.gate.weight model.layers.0.mlp.experts.gate_up_proj"),
    ),
    Expected(
        "GptOssForCausalLM",
        lambda: transformers.GptOssConfig(**DECODER, num_local_experts=4, head_dim=16),
        vocabulary=names("model.embed_tokens.weight lm_head.weight"),
        vector=names("model.layers.0.mlp.experts.gate_up_proj_bias model.layers.0.mlp.experts.down_proj_bias"),
        matrix=names("model.layers.0.mlp.router.weight"),
    ),
    Expected(
        "DeepseekV3ForCausalLM",
        lambda: transformers.DeepseekV3Config(
            **DECODER | {"num_key_value_heads": 4}, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
            moe_intermediate_size=32, kv_lora_rank=4, q_lora_rank=4, qk_rope_head_dim=8, qk_nope_head_dim=8,
            v_head_dim=16, first_k_dense_replace=0,
        ),
        vocabulary=names("model.embed_tokens.weight lm_head.weight"),
        matrix=names("model.layers.0.mlp.gate.weight model.layers.0.self_attn.q_a_proj.weight"),
    ),
    Expected(
        "GemmaForCausalLM",
        lambda: transformers.GemmaConfig(**DECODER, head_dim=16),
        vocabulary=names("model.embed_tokens.weight"),
    ),
    Expected(
        "MambaForCausalLM",
        lambda: transformers.MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=1),
        vocabulary=names("backbone.embeddings.weight"),
        vector=names("backbone.layers.0.mixer.A_log"),
        matrix=names("backbone.layers.0.mixer.conv1d.weight backbone.layers.0.mixer.dt_proj.weight"),
    ),
    Expected(
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2, n_inner=256),
        vocabulary=names("transformer.wte.weight transformer.wpe.weight"),
        matrix=names("transformer.h.0.mlp.c_fc.weight"),
    ),
    Expected(
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(vocab_size=300, d_model=32, d_ff=512, d_kv=8, num_layers=1, num_heads=4),
        vocabulary=names(
            "shared.weight encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight "
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
        matrix=names("encoder.block.0.layer.1.DenseReluDense.wi.weight"),
    ),
    Expected(
        "BertForMaskedLM",
        lambda: transformers.BertConfig(**TEXT),
        vocabulary=frozenset(
            f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")
        ),
    ),
    Expected(
        # The hidden layers have the shape of the position table.
        "OPTForCausalLM",
        lambda: transformers.OPTConfig(
            vocab_size=512, hidden_size=32, ffn_dim=256, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=254,
        ),
        vocabulary=names("model.decoder.embed_tokens.weight model.decoder.embed_positions.weight"),
        matrix=names("model.decoder.layers.0.fc1.weight"),
    ),
    Expected(
        "ViTForImageClassification",
        lambda: transformers.ViTConfig(**VISION),
        vector=names("vit.embeddings.cls_token vit.embeddings.position_embeddings"),
        convolution=names("vit.embeddings.patch_embeddings.projection.weight"),
    ),
    Expected(
        # get_input_embeddings() of its vision tower is a convolution.
        "CLIPModel",
        lambda: transformers.CLIPConfig(text_config=TEXT, vision_config=VISION),
        vocabulary=names(
            "text_model.embeddings.token_embedding.weight text_model.embeddings.position_embedding.weight "
            "vision_model.embeddings.position_embedding.weight"
        ),
        convolution=names("vision_model.embeddings.patch_embedding.weight"),
        matrix=names("text_projection.weight visual_projection.weight"),
    ),
    Expected(
        "CLIPVisionModel",
        lambda: transformers.CLIPVisionConfig(**VISION),
        vocabulary=names("embeddings.position_embedding.weight"),
        convolution=names("embeddings.patch_embedding.weight"),
    ),
    Expected(
        "WhisperForConditionalGeneration",
        lambda: transformers.WhisperConfig(
            vocab_size=512, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=32,
            max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        vocabulary=names("model.decoder.embed_tokens.weight model.decoder.embed_positions.weight"),
    ),
    Expected(
        "ResNetForImageClassification",
        lambda: transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]),
    ),
    Expected(
        "ConvNextV2ForImageClassification",
        lambda: transformers.ConvNextV2Config(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
        vector=frozenset(
            f"convnextv2.encoder.stages.{stage}.layers.0.grn.{name}" for stage in (0, 1) for name in ("weight", "bias")
        ),
        matrix=names("convnextv2.encoder.stages.0.layers.0.dwconv.weight"),
    ),
    Expected(
        "SwinForImageClassification",
        lambda: transformers.SwinConfig(
            image_size=64, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
        ),
        vector=frozenset(
            f"swin.encoder.layers.{layer}.blocks.0.attention.relative_position_bias.relative_position_bias_table"
            for layer in (0, 1)
        ),
    ),
    Expected(
        "Wav2Vec2ForCTC",
        lambda: transformers.Wav2Vec2Config(
            **ENCODER, vocab_size=32, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2),
            num_conv_pos_embeddings=64, num_conv_pos_embedding_groups=2,
        ),
        vector=names("wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
        convolution=names("wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", EXPECTED, ids=str)
def test_kinds_of_transformers_models(case: Expected) -> None:
    model = getattr(transformers, case.model)(case.config())
    found = kinds(model)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert found.keys() == trained.keys()
    wide = {name: found[name] for name, param in trained.items() if param.dim() > 1}
    for kind in ("vocabulary", "vector", "convolution"):
        assert {name for name in wide if wide[name] == kind} == getattr(case, kind), kind
    assert {wide[name] for name in case.matrix} <= {"matrix"}
    assert {found[name] for name, param in trained.items() if param.dim() < 2} == {"vector"}


HEADS = [
    ("ConvNextForImageClassification", "ConvNextConfig"),
    ("SegformerForSemanticSegmentation", "SegformerConfig"),
    ("HubertForCTC", "HubertConfig"),
    ("MobileNetV2ForImageClassification", "MobileNetV2Config"),
    ("RegNetForImageClassification", "RegNetConfig"),
]


@pytest.mark.parametrize(("model", "config"), HEADS, ids=[name for name, _ in HEADS])
def test_models_without_input_embeddings(model: str, config: str) -> None:
    """``get_input_embeddings()`` of these raises NotImplementedError; nothing of them is an embedding."""
    with torch.device("meta"):
        made = getattr(transformers, model)(getattr(transformers, config)())
    with pytest.raises(NotImplementedError):
        made.get_input_embeddings()
    assert set(kinds(made).values()) <= {"matrix", "convolution", "vector"}


def test_parametrized_and_weight_normed_layers() -> None:
    """Directions and originals are what their layer's weight is; magnitudes, one for each row, are vectors."""
    linear = parametrizations.weight_norm(nn.Linear(64, 512))
    found = kinds(nn.Sequential(linear))
    assert found["0.parametrizations.weight.original0"] == "vector"
    assert found["0.parametrizations.weight.original1"] == "matrix"
    assert kinds(parametrizations.spectral_norm(nn.Linear(64, 512)))["parametrizations.weight.original"] == "matrix"
    assert kinds(parametrizations.orthogonal(nn.Linear(8, 512)))["parametrizations.weight.original"] == "matrix"
    kernel = kinds(parametrizations.weight_norm(nn.Conv1d(4, 8, 64), dim=2))
    assert set(kernel.values()) == {"convolution", "vector"}
    assert kernel["parametrizations.weight.original0"] == kernel["bias"] == "vector"
    table = kinds(parametrizations.weight_norm(nn.Embedding(512, 64)))
    assert table == {
        "parametrizations.weight.original0": "vector",
        "parametrizations.weight.original1": "vocabulary",
    }
    with pytest.warns(FutureWarning, match="weight_norm"):
        older = weight_norm(nn.Linear(64, 512))
    assert kinds(older) == {"weight_g": "vector", "weight_v": "matrix", "bias": "vector"}


def test_norms_and_marked_parameters_are_vectors_of_any_shape() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm((16, 8, 8))
            self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
            self.marked = nn.Parameter(torch.zeros(64, 16))
            self.marked._no_weight_decay = True  # as mamba_ssm marks its own
            self.cell = nn.LSTMCell(8, 64)
            self.pos_embed = nn.Parameter(torch.zeros(197, 16))
            self.mixing = nn.Parameter(torch.zeros(197, 16))

    found = kinds(Mixer())
    vectors = {"norm.weight", "norm.bias", "attention.bias_k", "attention.bias_v", "marked", "pos_embed"}
    assert {found[name] for name in vectors} == {"vector"}
    assert {found[name] for name in ("attention.in_proj_weight", "cell.weight_ih", "mixing")} == {"matrix"}


def test_shapes_alone_keep_the_momentum_of_hidden_tensors() -> None:
    """A UNet's convolutions, an MLP wider than four times and adapters, without ``param_groups``."""
    unet = nn.ModuleDict(
        {
            "down": nn.Conv2d(64, 128, 3),
            "middle": nn.Conv2d(128, 128, 3),
            "depthwise": nn.Conv2d(128, 128, 3, groups=128),
            "up": nn.ConvTranspose2d(128, 64, 2),
            "wide": nn.Linear(64, 640, bias=False),
        }
    )
    adapters = [nn.Parameter(torch.zeros(shape)) for shape in ((8, 4096), (4096, 8))]
    named = [*unet.named_parameters(), *zip(("A", "B"), adapters, strict=True)]
    rows = {row.name: row for row in Flora(named, lr=1e-3, rank=16).report().rows}
    assert {rows[f"{name}.weight"].momentum for name in ("down", "middle", "up", "wide")} == {"sketch"}
    assert {rows[name].momentum for name in ("depthwise.weight", "A", "B")} == {"whole"}
    # 8 bits for each number, a scale for each block of 64, a factored second moment, and the step.
    assert rows["A"].state_bytes == 8 * 4096 + 4 * 8 * 64 + 4 * (8 + 4096) + 16
    assert rows["B"].state_bytes == 4096 * 8 + 4 * 4096 + 4 * (8 + 4096) + 16
