"""Small models of every kind, and combinations of model, optimizer, dtype, accumulation and checkpointing."""

from dataclasses import dataclass, replace
from typing import Any

from transformers import GPT2Config, LlamaConfig, MixtralConfig, T5Config, ViTConfig

from floragrad.cli.plan.models import PlannedModel, planned_model
from floragrad.cli.plan.result import OptimizerName, PlanSettings

SMALL = PlanSettings(batch=2, sequence=32, rank=8)
VOCABULARY = 320


def gpt2(blocks: int) -> Any:
    return GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=blocks, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )


def llama(blocks: int) -> Any:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


def t5(blocks: int) -> Any:
    return T5Config(
        vocab_size=VOCABULARY, d_model=64, d_ff=128, d_kv=16, num_layers=blocks, num_heads=4, decoder_start_token_id=0
    )


def experts(blocks: int) -> Any:
    return MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )


def vit(blocks: int) -> Any:
    return ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )


KINDS = {"gpt2": gpt2, "llama": llama, "t5": t5, "experts": experts, "vit": vit}


def subject(kind: str, blocks: int = 2) -> PlannedModel:
    return planned_model(KINDS[kind](blocks), kind)


@dataclass(frozen=True)
class Combination:
    kind: str
    optimizer: OptimizerName
    dtype: str = "float32"
    accumulate: int = 1
    checkpointing: bool = False

    def __str__(self) -> str:
        again = "-checkpointing" if self.checkpointing else ""
        return f"{self.kind}-{self.optimizer}-{self.dtype}-{self.accumulate}{again}"

    @property
    def settings(self) -> PlanSettings:
        return replace(
            SMALL,
            optimizers=(self.optimizer,),
            dtype=self.dtype,
            accumulate=self.accumulate,
            checkpointing=self.checkpointing,
        )


COMBINATIONS = [
    Combination("gpt2", "adamw"),
    Combination("gpt2", "flora+accumulator", "bfloat16", 4, checkpointing=True),
    Combination("llama", "flora"),
    Combination("llama", "flora+release", "bfloat16"),
    Combination("llama", "adamw-8bit", "bfloat16", 3, checkpointing=True),
    Combination("llama", "lora", "bfloat16", 2),
    Combination("t5", "flora+accumulator", "float32", 3),
    Combination("t5", "adafactor", "bfloat16", checkpointing=True),
    Combination("experts", "flora", "bfloat16", 3),
    Combination("experts", "adamw", "bfloat16", checkpointing=True),
    Combination("vit", "galore"),
    Combination("vit", "flora+release", "bfloat16", 5, checkpointing=True),
]
