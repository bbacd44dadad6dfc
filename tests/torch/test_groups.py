"""param_groups: module type first, shape second, every parameter once."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from floragrad import Flora, GradientAccumulator, param_groups


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: group["kind"] for group in param_groups(model, lr=1e-3) for name, _ in group["params"]}


def llama(**changes: object) -> LlamaForCausalLM:
    config = {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 1,
        "num_attention_heads": 8, "num_key_value_heads": 1,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config | changes))


@pytest.mark.parametrize("tied", [True, False])
def test_llama_with_wide_mlp_and_grouped_queries(tied: bool) -> None:
    """An aspect ratio above 4 does not make a hidden matrix a vocabulary: k_proj is 8 x 64, up_proj 512 x 64."""
    found = kinds(llama(tie_word_embeddings=tied))
    layer = "model.layers.0."
    assert found[layer + "self_attn.k_proj.weight"] == "matrix"
    assert found[layer + "mlp.up_proj.weight"] == "matrix"
    assert found[layer + "input_layernorm.weight"] == "vector"
    assert found["model.embed_tokens.weight"] == "vocabulary"
    assert ("lm_head.weight" in found) != tied
    assert found.get("lm_head.weight", "vocabulary") == "vocabulary"


def test_kind_overrules_the_aspect_ratio_in_the_optimizer() -> None:
    optimizer = Flora(param_groups(llama(), lr=1e-3), lr=1e-3, rank=8)
    rows = {row.name: row for row in optimizer.report().rows}
    assert rows["model.layers.0.mlp.up_proj.weight"].momentum == "sketch"
    assert rows["model.embed_tokens.weight"].reason == "vocabulary: no momentum"
    # Without modules a short table is not taken for a vocabulary.
    bare = {row.name: row for row in Flora(llama().named_parameters(), lr=1e-3, rank=8).report().rows}
    assert bare["model.layers.0.mlp.up_proj.weight"].momentum == "sketch"
    assert bare["model.embed_tokens.weight"].momentum == "sketch"


@pytest.mark.parametrize(
    ("model", "vocabulary"),
    [
        (
            GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2)),
            {"transformer.wte.weight", "transformer.wpe.weight"},
        ),
        (
            T5ForConditionalGeneration(
                T5Config(vocab_size=300, d_model=32, d_ff=512, d_kv=8, num_layers=1, num_heads=4)
            ),
            {
                "shared.weight",
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            },
        ),
    ],
    ids=["gpt2", "t5"],
)
def test_embeddings_of_other_families(model: nn.Module, vocabulary: set[str]) -> None:
    found = kinds(model)
    assert {name for name, kind in found.items() if kind == "vocabulary"} == vocabulary
    assert {name for name, _ in model.named_parameters()} == set(found)


def test_a_plain_output_head_is_found_by_its_shape() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(400, 32)
            self.hidden = nn.Linear(32, 32)
            self.head = nn.Linear(32, 400)
            self.table = nn.Parameter(torch.zeros(640, 32))
            self.square = nn.Parameter(torch.zeros(32, 32))

    found = kinds(Plain())
    assert {name for name, kind in found.items() if kind == "vocabulary"} == {
        "embed.weight",
        "head.weight",
    }
    assert found["table"] == found["square"] == found["hidden.weight"] == "matrix"


def test_a_declared_head_is_the_only_one() -> None:
    """The hidden layers of this Llama have the shape of its embedding."""
    found = kinds(llama(vocab_size=512))
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"] == "vocabulary"
    assert {found[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")} == {"matrix"}


def test_convolutions_are_matrices_whatever_their_aspect() -> None:
    depthwise = nn.Conv2d(256, 256, 3, groups=256)
    assert kinds(nn.Sequential(depthwise)) == {"0.weight": "matrix", "0.bias": "vector"}


def test_wide_kernels_are_convolutions_where_their_module_is() -> None:
    """By shape alone, 16 x 3 kernels of 32 x 32 are a stack of 48 matrices that rank 8 cuts by 4."""
    patches = nn.Conv2d(3, 16, 32, stride=32)
    assert kinds(nn.Sequential(patches)) == {"0.weight": "convolution", "0.bias": "vector"}
    [row, _] = Flora(param_groups(patches, lr=1e-3), rank=8).report().rows
    assert (row.view, row.momentum, row.ratio) == ((1, 16, 3 * 32 * 32), "sketch", 2)
    [row, _] = Flora(patches.parameters(), lr=1e-3, rank=8).report().rows
    assert (row.view, row.ratio) == ((48, 32, 32), 4)


@pytest.mark.parametrize("accumulate", [False, True])
def test_kinds_without_a_matrix_view_of_their_own_train(accumulate: bool) -> None:
    """A wide kernel and stacked biases against the same numbers as a matrix and a vector: bit for bit."""

    def trained(kernel: tuple[int, ...], biases: tuple[int, ...]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in (kernel, biases)]
        kinds = ("convolution", "vector")
        groups = [{"params": [param], "kind": kind} for param, kind in zip(params, kinds, strict=True)]
        optimizer = Flora(groups, lr=1e-2, rank=4, kappa=2)
        accumulator = GradientAccumulator(optimizer, 1) if accumulate else None
        for _ in range(3):
            targets = [torch.randn(param.numel(), generator=generator) for param in params]
            loss = sum((param.flatten() * target).sum() for param, target in zip(params, targets, strict=True))
            if accumulator is None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            else:
                accumulator.backward(loss)
                accumulator.step()
        if accumulator is not None:
            accumulator.close()
        return [param.detach().flatten() for param in params]

    for found, expected in zip(trained((16, 2, 3, 32), (4, 40)), trained((16, 192), (160,)), strict=True):
        assert torch.equal(found, expected)


def test_frozen_parameters_are_left_out_and_tied_ones_stand_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(32, 400, bias=False)
            self.embed = nn.Embedding(400, 32)
            self.embed.weight = self.head.weight
            self.frozen = nn.Linear(32, 32)
            self.frozen.requires_grad_(False)

    [group] = param_groups(Tied(), lr=1e-3)
    assert group["kind"] == "vocabulary"
    assert [name for name, _ in group["params"]] == ["head.weight"]


def test_rates_decay_and_further_options() -> None:
    groups = {g["kind"]: g for g in param_groups(llama(), lr=5e-4, embedding_lr=1e-2, weight_decay=0.1, rank=4)}
    assert {kind: (g["lr"], g["weight_decay"], g["rank"]) for kind, g in groups.items()} == {
        "matrix": (5e-4, 0.1, 4),
        "vocabulary": (1e-2, 0.1, 4),
        "vector": (5e-4, 0.0, 4),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeding_lr": 1e-2}, r"got 'embeding_lr', .* \(did you mean embedding_lr\?\); .*extra=\{'embeding_lr'"),
        ({"rnk": 8}, r"got 'rnk', .* \(did you mean rank\?\)"),
        ({"betas": (0.9, 0.95)}, r"an option of another optimizer goes into extra=\{'betas': \.\.\.\}"),
        ({"fused": True}, r"got 'fused', which is no option of Flora; an option of another"),
        ({"kind": "matrix"}, r"sets 'kind' for each group by itself: leave it out"),
        ({"extra": {"lr": 1.0}}, r"sets 'lr' for each group by itself: leave it out"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        param_groups(nn.Linear(8, 8), lr=1e-3, **options)


def test_options_of_another_optimizer_are_passed_on() -> None:
    groups = param_groups(nn.Linear(8, 8), lr=1e-3, extra={"betas": (0.8, 0.9)})
    assert [group["betas"] for group in torch.optim.AdamW(groups).param_groups] == [(0.8, 0.9)] * 2


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_any_torch_optimizer_takes_them(optimizer: type[torch.optim.Optimizer]) -> None:
    model = llama()
    made = optimizer(param_groups(model, lr=1e-3, embedding_lr=1e-2))
    assert [group["lr"] for group in made.param_groups] == [1e-3, 1e-2, 1e-3]
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(model.parameters()))
