"""The models that ``floragrad plan`` knows by name: their shapes as plain numbers, each with its source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from floragrad.cli.presets import PRESETS as TRAINED

GPT2: Final = "Radford et al. 2019, https://huggingface.co/openai-community"
T5: Final = "Raffel et al. 2020 (arXiv 1910.10683), https://huggingface.co/google-t5"
GALORE: Final = "Zhao et al. 2024 (arXiv 2403.03507), appendix"
LLAMA3: Final = "Llama Team 2024 (arXiv 2407.21783), https://huggingface.co/meta-llama"
QWEN2: Final = "Qwen Team 2024 (arXiv 2412.15115), https://huggingface.co/Qwen"
QWEN3: Final = "Qwen Team 2025 (arXiv 2505.09388), https://huggingface.co/Qwen"
MISTRAL: Final = "Jiang et al. 2023 (arXiv 2310.06825), https://huggingface.co/mistralai"
MIXTRAL: Final = "Jiang et al. 2024 (arXiv 2401.04088), https://huggingface.co/mistralai"
VIT: Final = "Dosovitskiy et al. 2021 (arXiv 2010.11929), table 1, https://huggingface.co/google"


@dataclass(frozen=True)
class ModelPreset:
    """One model.

    Attributes:
        model_type: Its architecture, as transformers names it.
        numbers: Attributes that differ from that architecture's defaults.
        source: Where the numbers are published.
    """

    model_type: str
    numbers: Mapping[str, int | bool]
    source: str


def _gpt2(width: int, layers: int, heads: int) -> ModelPreset:
    return ModelPreset("gpt2", {"n_embd": width, "n_layer": layers, "n_head": heads}, GPT2)


def _t5(width: int, inner: int, layers: int, heads: int, head_width: int = 64) -> ModelPreset:
    numbers = {"d_model": width, "d_ff": inner, "num_layers": layers, "num_heads": heads, "d_kv": head_width}
    return ModelPreset("t5", {**numbers, "vocab_size": 32128, "decoder_start_token_id": 0}, T5)


def _decoder(
    model_type: str,
    source: str,
    width: int,
    inner: int,
    layers: int,
    heads: int,
    groups: int,
    vocabulary: int,
    positions: int,
    **more: int | bool,
) -> ModelPreset:
    """Return a decoder of Llama's kind; ``groups`` are its heads of keys and values."""
    numbers = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
    }
    return ModelPreset(model_type, {**numbers, **more}, source)


def _galore(size: str) -> ModelPreset:
    shape = TRAINED[size]
    sizes = (shape.hidden_size, shape.intermediate_size, shape.layers, shape.heads, shape.heads, shape.vocab_size)
    return _decoder("llama", GALORE, *sizes, positions=1024)


def _qwen2(width: int, inner: int, layers: int, heads: int, groups: int, tied: bool) -> ModelPreset:
    vocabulary, positions = (151936, 32768) if tied else (152064, 131072)
    sizes = (width, inner, layers, heads, groups, vocabulary, positions)
    return _decoder("qwen2", QWEN2, *sizes, tie_word_embeddings=tied)


def _qwen3(width: int, inner: int, layers: int, heads: int, tied: bool) -> ModelPreset:
    sizes = (width, inner, layers, heads, 8, 151936, 40960)
    return _decoder("qwen3", QWEN3, *sizes, head_dim=128, tie_word_embeddings=tied)


def _vit(width: int, inner: int, layers: int, heads: int) -> ModelPreset:
    numbers = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_labels": 1000,
    }
    return ModelPreset("vit", numbers, VIT)


MODELS: Final = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "t5-small": _t5(512, 2048, 6, 8),
    "t5-base": _t5(768, 3072, 12, 12),
    "t5-large": _t5(1024, 4096, 24, 16),
    "t5-3b": _t5(1024, 16384, 24, 32, head_width=128),
    "llama-60m": _galore("60m"),
    "llama-130m": _galore("130m"),
    "llama-350m": _galore("350m"),
    "llama-1b": _galore("1b"),
    "llama-3-8b": _decoder("llama", LLAMA3, 4096, 14336, 32, 32, 8, 128256, 8192),
    "llama-3-70b": _decoder("llama", LLAMA3, 8192, 28672, 80, 64, 8, 128256, 8192),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, tied=False),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, tied=False),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, tied=False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, tied=False),
    "mistral-7b": _decoder("mistral", MISTRAL, 4096, 14336, 32, 32, 8, 32000, 32768),
    "mixtral-8x7b": _decoder("mixtral", MIXTRAL, 4096, 14336, 32, 32, 8, 32000, 32768),
    "vit-b-16": _vit(768, 3072, 12, 12),
    "vit-l-16": _vit(1024, 4096, 24, 16),
}
"""Models by name. Other attributes have the defaults of transformers' configuration class."""
