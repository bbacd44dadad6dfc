"""Text to numbers: the tokenizer, the held-out part, and blocks of one length."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from floragrad.cli.errors import UserError
from floragrad.cli.presets import PRESETS
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.data import HELD_OUT, Data, Example, divide
from floragrad.cli.train.sources import MEGABYTE, Documents

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_SAMPLE = 2 * MEGABYTE
"""Characters that the tokenizer is trained on, at most: more of them change little and take longer."""
DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class CorpusFacts:
    """Facts of a prepared corpus, for the summary and for readers of the folder.

    ``documents`` and ``megabytes`` (of UTF-8) include those held out, ``skipped`` counts files and rows without
    text, and ``sha256`` is that of all tokens. ``validation_source`` is empty where the held-out text is a part.
    """

    source: str
    documents: int
    skipped: int
    megabytes: float
    train_tokens: int
    validation_tokens: int
    vocab_size: int
    dtype: str
    sha256: str
    validation_source: str = ""


class Corpus(Data):
    """A prepared text."""

    facts_type = CorpusFacts

    def counts(self, config: RunConfig) -> tuple[int, int]:
        """Count the blocks to train on, and those held out."""
        length = config.sequence_length
        return self.facts.train_tokens // length, self.facts.validation_tokens // length

    def reader(self, part: str, config: RunConfig) -> Callable[[int], Example]:
        """Return a function that reads a block of a part."""
        return blocks(np.memmap(self.folder / f"{part}.bin", dtype=self.facts.dtype, mode="r"), config.sequence_length)

    def describe(self) -> str:
        """Return the source and the sizes of the text."""
        facts = self.facts
        origin = f" from {facts.validation_source}" if facts.validation_source else ""
        skipped = f", {facts.skipped} that are no text left out" if facts.skipped else ""
        return (
            f"{facts.source}: {facts.documents:,} documents, {facts.megabytes:.1f} MB{skipped}; "
            f"{facts.train_tokens:,} tokens to train on, {facts.validation_tokens:,} held out{origin}, "
            f"vocabulary {facts.vocab_size:,}"
        )


def blocks(tokens: NDArray[Any], length: int) -> Callable[[int], Example]:
    """Return a function that reads a block of ``length`` tokens; a rest that fills no block is left out."""
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)

    def read(index: int) -> Example:
        block = rows[index].astype(np.int64)
        return {"input_ids": block, "labels": block}

    return read


def prepare_corpus(config: RunConfig, documents: Documents, folder: Path, rows: int | None = None) -> Corpus:
    """Tokenize ``documents`` into ``folder``: two files of tokens, the tokenizer, and their facts.

    Args:
        config: Of the run. Text too short for one of its blocks to train on and one to validate with is refused.
        documents: The texts.
        folder: An empty one.
        rows: Of the model's embedding; None where it gets as many as the tokenizer has entries.
    """
    held_out = documents.validation
    train, validation = split(documents.texts) if held_out is None else (documents.texts, held_out.texts)
    every = [documents] if held_out is None else [documents, held_out]
    tokenizer = _tokenizer(config, train)
    tokenizer.save_pretrained(folder / "tokenizer")
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    digest = hashlib.sha256()
    counts = {}
    for name, texts in (("train", train), ("validation", validation)):
        counts[name] = 0
        with open(folder / f"{name}.bin", "wb") as file:
            for ids in _encoded(tokenizer, texts):
                check_known(config, tokenizer, ids, rows)
                data = np.asarray(ids, dtype=dtype).tobytes()
                digest.update(data)
                counts[name] += len(ids)
                file.write(data)
    if min(counts.values()) < config.sequence_length:
        raise UserError(
            f"the text is too short: {counts['train']} tokens to train on, {counts['validation']} held out, "
            f"one block needs {config.sequence_length} of each: give more text or a smaller --sequence-length"
        )
    facts = CorpusFacts(
        source=documents.source,
        documents=sum(len(each.texts) for each in every),
        skipped=sum(each.skipped for each in every),
        megabytes=sum(len(text.encode("utf-8")) for each in every for text in each.texts) / MEGABYTE,
        train_tokens=counts["train"],
        validation_tokens=counts["validation"],
        vocab_size=len(tokenizer),
        dtype=dtype,
        sha256=digest.hexdigest(),
        validation_source="" if held_out is None else held_out.source,
    )
    return Corpus(folder, facts).saved()


def check_known(config: RunConfig, tokenizer: Any, ids: list[int], rows: int | None) -> None:
    """Refuse tokens that the model's embedding has no rows for."""
    if rows is not None and max(ids, default=0) >= rows:
        raise UserError(
            f"--model {config.model} has an embedding of {rows} rows, and its tokenizer makes token {max(ids)} of "
            f"{len(tokenizer)} from this text: save the tokenizer that belongs to the model, or the model after "
            "resize_token_embeddings"
        )


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return the texts to train on, and those held out: every tenth; of fewer than ten, the last tenth of each.

    Example:
        >>> train, validation = split([str(number) for number in range(20)])
        >>> validation, len(train)
        (['9', '19'], 18)
        >>> split(["abcdefghij" * 2])
        (['abcdefghijabcdefgh'], ['ij'])
    """
    if len(texts) >= HELD_OUT:
        return divide(texts)
    cuts = [len(text) - len(text) // HELD_OUT for text in texts]
    return [text[:cut] for text, cut in zip(texts, cuts, strict=True)], [
        text[cut:] for text, cut in zip(texts, cuts, strict=True)
    ]


def _tokenizer(config: RunConfig, texts: list[str]) -> Any:
    return own_tokenizer(config.model) if config.vocab_size is None else train_tokenizer(texts, config.vocab_size)


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """Return a byte-level BPE tokenizer of at most ``vocab_size`` entries, trained on a sample of ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def own_tokenizer(model: str) -> Any:
    """Return the tokenizer of a model given by name or folder."""
    wrong = UserError(
        f"--model {model} has no tokenizer that can be loaded: save one beside its configuration, or choose one of "
        f"{', '.join(PRESETS)}, which train their own"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise wrong from error
    # Where there are no files, transformers makes an empty tokenizer of the model's kind.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise wrong
    return tokenizer


def _sample(texts: Iterable[str]) -> Iterator[str]:
    """Yield the first characters of all texts together, as many as the tokenizer is trained on."""
    left = TOKENIZER_SAMPLE
    for text in texts:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)


def _encoded(tokenizer: Any, texts: list[str]) -> Iterator[list[int]]:
    """Yield the tokens of each text, its end marked; many texts at once are encoded in parallel."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for start in range(0, len(texts), DOCUMENTS_AT_ONCE):
        batch = tokenizer(texts[start : start + DOCUMENTS_AT_ONCE], add_special_tokens=False)
        for ids in batch["input_ids"]:
            yield ids + end
