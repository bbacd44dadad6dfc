"""Print bytes of optimizer state for models of known shapes on the meta device: nothing is allocated.

    python -m benchmarks.state_bytes

The same policy allocates the real state; ``tests/torch/test_report.py`` checks that both are equal to the byte, for
Flora and for the two peers.
"""

import torch

from benchmarks import harness
from floragrad import Flora, param_groups
from floragrad.cli.plan.models import find_model

MODELS = {
    "GPT-2 small": ("gpt2", torch.float32),
    "Llama 350M": ("llama-350m", torch.float32),
    "Llama-3-8B": ("llama-3-8b", torch.bfloat16),
}
"""Presets of ``floragrad plan``."""
RANK = 128


def main() -> None:
    header = (
        "model",
        "weights",
        "AdamW",
        "Adafactor, β₁ = 0.9",
        f"Flora, int8, rank {RANK}",
        f"Flora, int4, rank {RANK}",
    )
    rows = []
    for name, (preset, dtype) in MODELS.items():
        planned = find_model(preset)
        with torch.device("meta"):
            model = planned.build(dtype)
        int8, int4 = (
            Flora(param_groups(model, lr=1e-3), lr=1e-3, rank=RANK, state_dtype=state_dtype).report()
            for state_dtype in ("int8", "int4")
        )
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        counts = (weights, int8.adamw_bytes, int8.adafactor_bytes, int8.state_bytes, int4.state_bytes)
        precision = str(dtype).removeprefix("torch.")
        rows.append((f"{name}, {precision}", *(f"{count / 1e6:,.1f} MB" for count in counts)))
    print("\n".join(harness.table(header, rows)))


if __name__ == "__main__":
    main()
