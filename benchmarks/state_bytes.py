"""Bytes of optimizer state for models of known shapes, built on the meta device: nothing is allocated.

    python benchmarks/state_bytes.py

The same policy allocates the real state; tests/torch/test_report.py holds that both are equal to the byte, for
Flora and for the two peers.
"""

import torch

from floragrad import Flora, param_groups
from floragrad.cli.plan.models import find_model

MODELS = {
    "GPT-2 small": ("gpt2", torch.float32),
    "Llama 350M": ("llama-350m", torch.float32),
    "Llama-3-8B": ("llama-3-8b", torch.bfloat16),
}
"""By their names in floragrad/cli/plan/presets.py, which has the sources."""
RANK = 128


def main() -> None:
    print(f"| model | weights | AdamW | Adafactor, β₁ = 0.9 | Flora, int8, rank {RANK} | Flora, int4, rank {RANK} |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (preset, dtype) in MODELS.items():
        planned = find_model(preset)
        with torch.device("meta"):
            model = planned.build(dtype, planned.blocks)
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
