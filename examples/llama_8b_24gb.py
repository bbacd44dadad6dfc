"""Fine-tune all weights of an 8B model on a card of 24 GB, without adapters and without offloading.

Shows the plan before anything runs, and then the loop: bfloat16 weights with stochastic rounding, momentum in four
bits, recomputed activations, and gradients that are folded and freed one by one.

Needs ``floragrad[train]``, and for the 8B model a GPU of 24 GiB: ``python examples/llama_8b_24gb.py --model
meta-llama/Meta-Llama-3-8B``. **Never run on a GPU so far**; all bytes are predicted. Without ``--model`` the same loop
trains a small Llama, also on a CPU. The text is the source of Python's standard library.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig

import floragrad
from floragrad import Flora, GradientAccumulator, param_groups

CARD = 24 * 2**30


def main(steps: int, name: str | None) -> None:
    """Plan, and train for a number of updates."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name is None:
        tokenizer = ByT5Tokenizer()
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes)).to(device)
        model, rank, length, micro_batches, rates = model.bfloat16(), 16, 128, 4, {"lr": 1e-3, "embedding_lr": 1e-2}
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, device_map=device)
        rank, length, micro_batches, rates = 128, 1024, 16, {"lr": 1e-5}

    planned = floragrad.plan(
        model.config,
        dtype="bfloat16",
        sequence=length,
        accumulate=micro_batches,
        checkpointing=True,
        rank=rank,
        state_dtype="int4",
        optimizers=("flora+accumulator",),
    ).optimizers["flora+accumulator"]
    print(f"predicted peak: {planned.peak / 1e9:.2f} GB of {CARD / 1e9:.2f} GB, during {planned.peak_moment}")

    model.gradient_checkpointing_enable()
    model.train()
    optimizer = Flora(param_groups(model, **rates), rank=rank, state_dtype="int4")
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in files)[: 8 * length * micro_batches * steps]
    blocks = tokenizer(text, return_tensors="pt").input_ids[0].unfold(0, length, length)

    with GradientAccumulator(optimizer, steps=micro_batches) as accumulator:
        for number, tokens in enumerate(blocks[: steps * micro_batches].to(device), start=1):
            loss = model(input_ids=tokens[None], labels=tokens[None]).loss
            accumulator.backward(loss)
            if accumulator.complete:
                accumulator.clip_grad_norm_(1.0)
                accumulator.step()
                print(f"step {number // micro_batches}: loss {loss.item():.4f}")
    if device == "cuda":
        print(f"measured peak: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", help="a model of the hub, or a folder; none: a small Llama")
    given = parser.parse_args()
    main(given.steps, given.model)
