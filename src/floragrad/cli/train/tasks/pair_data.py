"""Pairs of texts as tokens: prepared data of the tasks on pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.data import Data, Example

PADDING: Final = -100
"""Token of a label that does not count, as transformers has it; in the folder's files it fills sources too."""
END: Final = 0
"""Token of our tokenizers that ends a text; it begins a target too. In any model it fills up what is masked."""


@dataclass(frozen=True)
class PairFacts:
    """Facts of prepared pairs, for the summary and for readers of the folder.

    ``skipped`` counts pairs with a text that is too long; ``sha256`` is that of all tokens. ``start`` is the token
    before the first of a target, None where one model reads the source and the target in a row; ``end`` ends a text.
    """

    source: str
    skipped: int
    train_pairs: int
    held_out_pairs: int
    vocab_size: int
    sha256: str
    start: int | None = END
    end: int = END


def masked(tokens: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Return tokens with their padding masked."""
    known = tokens != PADDING
    return {"input_ids": np.where(known, tokens, END), "attention_mask": known.astype(np.int64)}


def _in_a_row(source: NDArray[np.int64], target: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Return source and target as one text, and the token that follows each of the text's as its label."""
    length = len(source) + len(target) - 1
    source, target = source[source != PADDING], target[target != PADDING]
    read = np.concatenate([source, target[:-1]])
    labels = np.concatenate([np.full(len(source) - 1, PADDING), target])
    padding = (0, length - len(read))
    return {
        **masked(np.pad(read, padding, constant_values=PADDING)),
        "labels": np.pad(labels, padding, constant_values=PADDING),
    }


class PairData(Data):
    """Prepared pairs: int32 tokens (n, source length + target length), each filled up with :data:`PADDING`."""

    facts_type = PairFacts

    def counts(self, _config: RunConfig) -> tuple[int, int]:
        """Count the pairs to train on, and those held out."""
        return self.facts.train_pairs, self.facts.held_out_pairs

    def describe(self) -> str:
        """Return the source and the number of the pairs."""
        facts = self.facts
        skipped = f" ({facts.skipped:,} that are too long left out)" if facts.skipped else ""
        return (
            f"{facts.source}: {facts.train_pairs:,} pairs to train on, {facts.held_out_pairs:,} held out{skipped}; "
            f"vocabulary {facts.vocab_size:,}"
        )

    def reader(self, part: str, config: RunConfig) -> Callable[[int], Example]:
        """Return a function that reads a pair of a part."""
        rows = np.load(self.folder / f"{part}.npy", mmap_mode="r")
        rows, start = rows.reshape(len(rows), -1), self.facts.start  # earlier versions kept (n, 2, length)

        def read(index: int) -> Example:
            source, target = np.split(rows[index].astype(np.int64), [config.sequence_length])
            if start is None:
                return _in_a_row(source, target)
            read_so_far = masked(np.concatenate([[start], target[:-1]]))["input_ids"]
            return {**masked(source), "decoder_input_ids": read_so_far, "labels": target}

        return read


def tokenize(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], config: RunConfig, *, in_a_row: bool, cut: bool
) -> NDArray[np.int32]:
    """Return the tokens of the pairs, their ends marked, filled up with :data:`PADDING`.

    Args:
        tokenizer: Of the model.
        pairs: Sources and targets.
        config: Of the run.
        in_a_row: Whether the model reads the target after the source: the source has no end then, but its suffix.
        cut: Whether texts that are too long are cut; else their pairs are left out.
    """
    suffix = config.source_suffix or ("\n" if in_a_row else "")
    sources = [f"{config.source_prefix}{source}{suffix}" for source, _ in pairs]
    targets = [target for _, target in pairs]
    end, tail = [tokenizer.eos_token_id], 1
    if in_a_row:
        # Tokenizers of causal models join a space to the word that follows.
        begin = suffix.rstrip(" ")
        sources = [source.rstrip(" ") for source in sources]
        targets = [f"{suffix[len(begin) :]}{target}" for target in targets]
        tail = len(tokenizer(begin, add_special_tokens=False)["input_ids"])
    lengths = (config.sequence_length, config.target_length or config.sequence_length)
    source_ids = _encoded(tokenizer, sources, [] if in_a_row else end, specials=True)
    target_ids = _encoded(tokenizer, targets, end, specials=not in_a_row)
    if cut:
        source_ids, target_ids = _cut(source_ids, lengths[0], tail), _cut(target_ids, lengths[1], 1)
    both = zip(source_ids, target_ids, strict=True)
    kept = [pair for pair in both if len(pair[0]) <= lengths[0] and len(pair[1]) <= lengths[1]]
    tokens = np.full((len(kept), sum(lengths)), PADDING, np.int32)
    for row, (source, target) in zip(tokens, kept, strict=True):
        row[: len(source)] = source
        row[lengths[0] : lengths[0] + len(target)] = target
    return tokens


def _encoded(tokenizer: Any, texts: list[str], end: list[int], *, specials: bool) -> list[list[int]]:
    """Return the tokens of texts, ended as told, whatever the tokenizer ends them with."""
    encoded = tokenizer(texts, add_special_tokens=specials)["input_ids"] if texts else []
    return [(ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids) + end for ids in encoded]


def _cut(texts: list[list[int]], length: int, tail: int) -> list[list[int]]:
    """Shorten texts that are too long before their last tokens."""
    return [ids if len(ids) <= length else ids[: length - tail] + ids[len(ids) - tail :] for ids in texts]
