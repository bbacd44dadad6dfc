"""Bytes of optimizer state for models of known shapes, built on the meta device: nothing is allocated.

    python benchmarks/state_bytes.py

The same policy allocates the real state; tests/torch/test_report.py holds that both are equal to the byte, for
Flora and for the two peers.
"""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from floragrad import Flora, param_groups

MODELS = {
    # Radford et al. 2019; the Llamas of GaLore (Zhao et al. 2024); Llama Team 2024.
    "GPT-2 small": (GPT2Config(), torch.float32),
    "Llama 350M": (
        LlamaConfig(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=2736,
            num_hidden_layers=24,
            num_attention_heads=16,
            tie_word_embeddings=False,
        ),
        torch.float32,
    ),
    "Llama-3-8B": (
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        ),
        torch.bfloat16,
    ),
}
RANK = 128


def main() -> None:
    print(f"| model | weights | AdamW | Adafactor, β₁ = 0.9 | Flora, int8, rank {RANK} | Flora, int4, rank {RANK} |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (config, dtype) in MODELS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        groups = [param_groups(model, lr=1e-3) for _ in range(2)]
        int8, int4 = (
            Flora(each, lr=1e-3, rank=RANK, state_dtype=state_dtype).report()
            for each, state_dtype in zip(groups, ("int8", "int4"), strict=True)
        )
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        cells = (weights, int8.adamw_bytes, int8.adafactor_bytes, int8.state_bytes, int4.state_bytes)
        precision = str(dtype).removeprefix("torch.")
        print(f"| {name}, {precision} | " + " | ".join(f"{count / 1e6:,.1f} MB" for count in cells) + " |")


if __name__ == "__main__":
    main()
