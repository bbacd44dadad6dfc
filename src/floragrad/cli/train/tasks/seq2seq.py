"""The task ``seq2seq``: a small encoder-decoder that translates German to English."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from floragrad._extras import require
from floragrad.cli.errors import UserError
from floragrad.cli.presets import TASKS
from floragrad.cli.train import manifest
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.corpus import train_tokenizer
from floragrad.cli.train.order import Order, divide, sampled
from floragrad.cli.train.tasks.pairs import read_pairs
from floragrad.cli.train.tasks.task import Blocks, Task

if TYPE_CHECKING:
    from torch import Tensor

PADDING: Final = -100
"""Token of a label that does not count, as transformers has it; in the folder's files it fills sources too."""
END: Final = 0
"""Token that ends a text; it begins a translation too, and fills up what is masked."""
TRANSLATED: Final = 128
"""Pairs of the validation sample that are translated, at most."""


@dataclass(frozen=True)
class PairFacts:
    """Facts of prepared pairs, for the summary and for readers of the folder.

    Attributes:
        source: Where the pairs come from.
        skipped: Pairs that were left out because a text is too long.
        train_pairs: Pairs to train on.
        held_out_pairs: Pairs held out.
        vocab_size: Entries of the tokenizer that both languages share.
        sha256: Of all tokens.
    """

    source: str
    skipped: int
    train_pairs: int
    held_out_pairs: int
    vocab_size: int
    sha256: str


class PairBlocks:
    """Pairs in an order, as tokens: int32 (n, 2, length), filled up with :data:`PADDING`."""

    def __init__(self, tokens: NDArray[np.int32], order: Order) -> None:
        self._tokens, self._order = tokens, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> dict[str, NDArray[Any]]:
        source, target = self._tokens[self._order[position]].astype(np.int64)
        before = np.concatenate([[END], target[:-1]])
        return {
            "input_ids": np.where(source == PADDING, END, source),
            "attention_mask": (source != PADDING).astype(np.int64),
            "decoder_input_ids": np.where(before == PADDING, END, before),
            "labels": target,
        }


@dataclass(frozen=True)
class PairData:
    """Prepared pairs: their folder, and their facts."""

    folder: Path
    facts: PairFacts

    @property
    def processor(self) -> Any:
        """The tokenizer, as transformers loads it."""
        return AutoTokenizer.from_pretrained(self.folder / "tokenizer", trust_remote_code=False)

    def train_blocks(self, config: RunConfig) -> PairBlocks:
        """Return the pairs that the run trains on, in order, to its end."""
        return PairBlocks(
            self._read("train"), Order(self.facts.train_pairs, config.seed, config.steps * config.units_per_step)
        )

    def validation_blocks(self, config: RunConfig) -> PairBlocks:
        """Return a sample of the held-out pairs."""
        chosen = sampled(self.facts.held_out_pairs, config.eval_blocks)
        return PairBlocks(self._read("validation")[chosen], Order(len(chosen)))

    def held_out_blocks(self, _config: RunConfig) -> int:
        """Count the held-out pairs."""
        return self.facts.held_out_pairs

    def describe(self) -> str:
        """Return the source and the number of the pairs."""
        facts = self.facts
        skipped = f" ({facts.skipped:,} that are too long left out)" if facts.skipped else ""
        return (
            f"{facts.source}: {facts.train_pairs:,} pairs to train on, {facts.held_out_pairs:,} held out{skipped}; "
            f"vocabulary {facts.vocab_size:,}"
        )

    def _read(self, part: str) -> NDArray[np.int32]:
        tokens: NDArray[np.int32] = np.load(self.folder / f"{part}.npy", mmap_mode="r")
        return tokens


class Translation(Task):
    """A T5, newly drawn, on pairs of texts."""

    auto_class = "AutoModelForSeq2SeqLM"
    blocks, everything = "held-out pairs", "all of them"

    def prepare(self, config: RunConfig, folder: Path) -> PairData:
        """Read and tokenize the pairs of a run and write them to a new folder."""
        _require_sacrebleu()
        pairs, source = read_pairs(config)
        parts = divide(pairs)
        folder.mkdir()
        assert config.vocab_size is not None
        tokenizer = train_tokenizer([text for pair in parts[0] for text in pair], config.vocab_size)
        tokenizer.save_pretrained(folder / "tokenizer")
        digest, counts = hashlib.sha256(), []
        for name, part in zip(("train", "validation"), parts, strict=True):
            tokens = _tokens(tokenizer, part, config.sequence_length)
            np.save(folder / f"{name}.npy", tokens)
            digest.update(tokens.tobytes())
            counts.append(len(tokens))
        if not all(counts):
            raise UserError(
                f"{source} has {counts[0]} pairs to train on and {counts[1]} held out of at most "
                f"{config.sequence_length} tokens: give more or a larger --sequence-length"
            )
        facts = PairFacts(
            source=source,
            skipped=len(pairs) - sum(counts),
            train_pairs=counts[0],
            held_out_pairs=counts[1],
            vocab_size=len(tokenizer),
            sha256=digest.hexdigest(),
        )
        manifest.write_facts(folder, asdict(facts))
        return PairData(folder, facts)

    def load(self, folder: Path) -> PairData:
        """Open prepared pairs."""
        _require_sacrebleu()
        return PairData(folder, PairFacts(**manifest.read_facts(folder)))

    def build(self, config: RunConfig, data: PairData) -> Any:
        """Return a new T5. The embedding of both languages and the output head are one, and there is no dropout."""
        from transformers import T5Config

        from floragrad.cli.train.models import new_model

        preset = TASKS["seq2seq"][config.model]
        architecture = T5Config(
            vocab_size=data.facts.vocab_size,
            d_model=preset.hidden_size,
            d_kv=preset.hidden_size // preset.heads,
            d_ff=preset.intermediate_size,
            num_heads=preset.heads,
            num_layers=preset.layers,
            dropout_rate=0.0,
            pad_token_id=END,
            eos_token_id=END,
            decoder_start_token_id=END,
        )
        return new_model(self.auto_class, architecture, config)

    def collate(self, blocks: list[Mapping[str, NDArray[Any]]]) -> dict[str, Any]:
        """Return a batch of tensors, as long as its longest texts: what is masked costs time."""
        batch = super().collate(blocks)
        source = int(batch["attention_mask"].sum(1).max())
        target = int((batch["labels"] != PADDING).sum(1).max())
        sides = {"input_ids": source, "attention_mask": source}
        return {name: tokens[:, : sides.get(name, target)] for name, tokens in batch.items()}

    def examine(self, model: Any, batch: Mapping[str, Any]) -> "dict[str, Tensor]":
        """Return the mean cross-entropy, in nats and float32, and the accuracy over each translation's tokens."""
        from torch.nn.functional import cross_entropy

        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits.float()
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PADDING, reduction="none")
        counted = labels != PADDING
        right = (logits.argmax(-1) == labels) & counted
        return {
            "loss": losses.view_as(labels).sum(1) / counted.sum(1),
            "token_accuracy": right.sum(1) / counted.sum(1),
        }

    def measure(self, model: Any, blocks: Blocks, processor: Any, move: Any) -> dict[str, float]:
        """Return the BLEU of greedy translations of the first pairs of the sample."""
        import sacrebleu

        batch = self.collate([blocks[position] for position in range(min(TRANSLATED, len(blocks)))])
        written = greedy(model, move(batch), batch["labels"].shape[1])
        translations, references = (
            processor.batch_decode(tokens, skip_special_tokens=True)
            for tokens in (written, batch["labels"].clamp(min=END))
        )
        return {"bleu": sacrebleu.corpus_bleu(translations, [references]).score}


def greedy(model: Any, batch: Mapping[str, Any], length: int) -> list[list[int]]:
    """Return the likeliest next tokens, one after the other: at most ``length``, up to the end of each text."""
    import torch

    mask = batch["attention_mask"]
    tokens = torch.full((len(mask), 1), END, device=mask.device)
    known: dict[str, Any] = {"input_ids": batch["input_ids"]}
    ended = torch.zeros_like(tokens[:, 0], dtype=torch.bool)
    for _ in range(length):
        found = model(**known, attention_mask=mask, decoder_input_ids=tokens[:, -1:], use_cache=True)
        known = {"encoder_outputs": (found.encoder_last_hidden_state,), "past_key_values": found.past_key_values}
        following = found.logits[:, -1].argmax(-1).masked_fill(ended, END)
        tokens = torch.cat([tokens, following[:, None]], 1)
        ended |= following == END
        if ended.all():
            break
    written: list[list[int]] = tokens[:, 1:].tolist()
    return written


def _tokens(tokenizer: Any, pairs: Sequence[tuple[str, str]], length: int) -> NDArray[np.int32]:
    """Return the tokens of the pairs of which both texts fit, their ends marked, filled up with :data:`PADDING`."""
    sides = [
        tokenizer([pair[side] for pair in pairs], add_special_tokens=False)["input_ids"] if pairs else []
        for side in (0, 1)
    ]
    kept = [pair for pair in zip(*sides, strict=True) if max(map(len, pair)) < length]
    tokens = np.full((len(kept), 2, length), PADDING, np.int32)
    for row, pair in zip(tokens, kept, strict=True):
        for side, ids in zip(row, pair, strict=True):
            side[: len(ids) + 1] = [*ids, END]
    return tokens


def _require_sacrebleu() -> None:
    """Refuse to begin what could not be measured.

    Raises:
        UserError: The package is missing; the message names the extra.
    """
    try:
        require("sacrebleu", "train")
    except ImportError as error:
        raise UserError(str(error)) from error
