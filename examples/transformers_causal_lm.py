"""Fine-tune a causal language model with transformers' Trainer.

Shows ``FloraTrainer``, which keeps the gradients of ``gradient_accumulation_steps`` in sketches, with clipping, a
schedule, and bfloat16 weights on a GPU, which Flora rounds stochastically: no float32 copy is needed.

Needs ``floragrad[transformers]``. ``--model NAME`` fine-tunes a model of the Hugging Face hub; without it a small Llama
is made, and nothing is downloaded. The text is the source of Python's standard library.
"""

import argparse
import sysconfig
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, TrainingArguments

from floragrad.transformers import FloraFactory, FloraTrainer

LENGTH = 128


def main(steps: int, name: str | None) -> None:
    """Train for a number of updates, of two micro-batches each."""
    if name is None:
        tokenizer = ByT5Tokenizer()  # one token for each byte: it needs no file
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, pad_token_id=0, **sizes)
        torch.manual_seed(0)
        model, rates = AutoModelForCausalLM.from_config(config), {"lr": 1e-3, "embedding_lr": 1e-2}
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, rates = AutoModelForCausalLM.from_pretrained(name), {"lr": 5e-5}
    if torch.cuda.is_available():
        model.to(torch.bfloat16)

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in files)[: 1000 * LENGTH]
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    blocks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    with tempfile.TemporaryDirectory() as folder:  # yours: a folder that stays
        trainer = FloraTrainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                gradient_checkpointing=name is not None,
                max_grad_norm=1.0,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                logging_steps=max(1, steps // 10),
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
            optimizer_cls_and_kwargs=(FloraFactory, {**rates, "rank": 32}),
        )
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {float(entry['loss']):.4f}")
    print(trainer.accumulator.report())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--model", help="a model of the hub, or a folder")
    given = parser.parse_args()
    main(given.steps, given.model)
