"""Models to train from scratch: small ones with a tokenizer of their own, and those of the hub without weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GPT2Config, T5Config

from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.corpus import train_tokenizer
from floragrad.cli.train.tasks.pairs import read_pairs


def write_bare(name: str, folder: Path) -> None:
    """Write the configuration and the tokenizer of a model, whose weights a run draws anew."""
    for auto in (AutoConfig, AutoTokenizer):
        auto.from_pretrained(name, trust_remote_code=False).save_pretrained(folder)


def write_small(task: str, folder: Path, width: int, layers: int, vocabulary: int, positions: int) -> None:
    """Write a small T5 for summarization, or a GPT-2 for translation, with a tokenizer of both tasks' texts.

    Args:
        task: ``"summarization"`` or ``"seq2seq"``.
        folder: Where to.
        width: Hidden size.
        layers: Of the T5's encoder, as many of its decoder, and half as many as of the GPT-2.
        vocabulary: Entries of the tokenizer.
        positions: Tokens that the GPT-2 reads in a row.
    """
    texts = [text for each in ("summarization", "seq2seq") for pair in _pairs(each, 1.0) for text in pair]
    tokenizer = train_tokenizer(texts, vocabulary)
    tokenizer.save_pretrained(folder)
    ends: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 0}
    if task == "summarization":
        sizes = {"d_model": width, "d_kv": width // 4, "d_ff": 2 * width, "num_heads": 4, "num_layers": layers}
        T5Config(**sizes, **ends, decoder_start_token_id=0, dropout_rate=0.0).save_pretrained(folder)
        return
    sizes = {"n_embd": width, "n_head": 4, "n_layer": 2 * layers, "n_positions": positions}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    GPT2Config(**sizes, **rates, **ends, bos_token_id=0).save_pretrained(folder)


def write_halves(folder: Path, megabytes: float) -> None:
    """Write the first and the second half of each description of a package, for pre-training, as JSON lines."""
    folder.mkdir()
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for text, _ in _pairs("summarization", megabytes):
            words = text.split()
            first, second = (" ".join(half) for half in (words[: len(words) // 2], words[len(words) // 2 :]))
            file.write(json.dumps({"document": first, "summary": second}) + "\n")


def _pairs(task: str, megabytes: float) -> Iterator[tuple[str, str]]:
    yield from read_pairs(RunConfig.resolve(task=task, max_megabytes=megabytes)).pairs
