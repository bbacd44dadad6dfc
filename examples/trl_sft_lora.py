"""Fine-tune LoRA adapters on prompts and completions with TRL's SFTTrainer.

Shows ``FloraTrainerMixin`` in front of SFTTrainer, and ``FloraFactory``, which is called once the adapters of peft are
there. An adapter's smaller side is its rank, so that there is little to compress: ``rank`` has to be below half of it.

Needs ``floragrad[transformers]``, ``trl`` and ``peft``. ``--model NAME`` fine-tunes a model of the Hugging Face hub;
without it a small Llama is made, and nothing is downloaded. The prompts are functions of Python's standard library, the
completions the first lines of their docstrings.
"""

import argparse
import ast
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig
from trl import SFTConfig, SFTTrainer

from floragrad.transformers import FloraFactory, FloraTrainerMixin


class FloraSFTTrainer(FloraTrainerMixin, SFTTrainer):
    """SFTTrainer that accumulates in sketches."""


def examples() -> Iterator[dict[str, str]]:
    """Yield each function's signature, and its docstring's first line."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield {"prompt": f"def {node.name}({ast.unparse(node.args)}):", "completion": text.partition("\n")[0]}


def main(steps: int, name: str | None) -> None:
    """Train for a number of updates, of two micro-batches each."""
    torch.manual_seed(0)
    if name is None:
        tokenizer = ByT5Tokenizer()  # one token for each byte: it needs no file
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    else:
        tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)

    with tempfile.TemporaryDirectory() as folder:  # yours: a folder that stays
        arguments = SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_length=256,
            bf16=torch.cuda.is_available(),
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to="none",
        )
        trainer = FloraSFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_list(list(examples())),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=32, target_modules="all-linear", modules_to_save=["lm_head"]),
            optimizer_cls_and_kwargs=(FloraFactory, {"lr": 2e-3, "rank": 8}),
        )
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {float(entry['loss']):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", help="a model of the hub, or a folder")
    given = parser.parse_args()
    main(given.steps, given.model)
