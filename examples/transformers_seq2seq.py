"""Train a T5 on pairs of texts with transformers' Seq2SeqTrainer: from a function's docstring to its name.

Shows ``FloraTrainerMixin`` in front of a Trainer of another kind: accumulation in sketches, losses per token over the
whole window, and padded batches of different lengths.

Needs ``floragrad[transformers]``. The pairs are the functions of Python's standard library, as bytes; no download.
"""

import argparse
import ast
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from floragrad.transformers import FloraFactory, FloraTrainerMixin


class FloraSeq2SeqTrainer(FloraTrainerMixin, Seq2SeqTrainer):
    """Seq2SeqTrainer that accumulates in sketches."""


def pairs() -> Iterator[tuple[str, str]]:
    """Yield the docstring's first line and the name of each function."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield text.partition("\n")[0], node.name


def main(steps: int) -> None:
    """Train for a number of updates, of two micro-batches each."""
    tokenizer = ByT5Tokenizer()  # one token for each byte: it needs no file
    rows = [tokenizer(text[:100], text_target=name) for text, name in pairs()]
    sizes = {"d_model": 128, "d_ff": 256, "d_kv": 32, "num_heads": 4, "num_layers": 2}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes))

    with tempfile.TemporaryDirectory() as folder:  # yours: a folder that stays
        trainer = FloraSeq2SeqTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=2,
                logging_steps=max(1, steps // 10),
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model),
            optimizer_cls_and_kwargs=(FloraFactory, {"lr": 1e-3, "embedding_lr": 1e-2, "rank": 16}),
        )
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {float(entry['loss']):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
