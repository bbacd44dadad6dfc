"""The tasks on pairs of texts: an encoder-decoder or a causal language model that translates or summarizes."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from floragrad._extras import require
from floragrad.cli.errors import UserError
from floragrad.cli.presets import TASKS
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.corpus import check_known, own_tokenizer, train_tokenizer
from floragrad.cli.train.data import Example, Examples, divide
from floragrad.cli.train.tasks.pair_data import END, PADDING, PairData, PairFacts, masked, tokenize
from floragrad.cli.train.tasks.pairs import read_pairs
from floragrad.cli.train.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor

GENERATED_AT_ONCE: Final = 32
ROUGES: Final = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Seq2Seq(Task):
    """A model on pairs of texts: a new T5 by size, or an encoder-decoder or causal language model of Hugging Face.

    Attributes:
        name: Of the task.
        package: Needed by ``score``.
        score: Measures of generated texts, given those and their references.
        cuts: Whether texts that are too long are cut; else their pairs are left out.
    """

    data = PairData
    auto_class = "AutoModelForSeq2SeqLM"
    blocks, everything = "held-out pairs", "all of them"
    name: str
    package: str
    score: Callable[[list[str], list[str]], dict[str, float]]
    cuts: bool

    def prepare(self, config: RunConfig, folder: Path) -> PairData:
        """Read and tokenize the pairs of a run and write them to a new folder."""
        self._require_package()
        pairs, source = read_pairs(config)
        parts = divide(pairs)
        folder.mkdir()
        tokenizer, rows, start = self._tokenizer(config, parts[0])
        tokenizer.save_pretrained(folder / "tokenizer")
        digest, counts = hashlib.sha256(), []
        for name, part in zip(("train", "validation"), parts, strict=True):
            tokens = tokenize(tokenizer, part, config, in_a_row=start is None, cut=self.cuts)
            check_known(config, tokenizer, [int(tokens.max(initial=0))], rows)
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
            start=start,
            end=tokenizer.eos_token_id,
        )
        return PairData(folder, facts).saved()

    def _tokenizer(self, config: RunConfig, pairs: Sequence[tuple[str, str]]) -> tuple[Any, int | None, int | None]:
        """Return the tokenizer, the rows of the model's embedding if it is not new, and the token before a target."""
        if config.model in TASKS[self.name]:
            assert config.vocab_size is not None
            return train_tokenizer([text for pair in pairs for text in pair], config.vocab_size), None, END
        from floragrad.cli.train.models import embedding_rows, model_config

        tokenizer, architecture = own_tokenizer(config.model), model_config(config, 0)
        start = architecture.decoder_start_token_id if architecture.is_encoder_decoder else None
        if tokenizer.eos_token_id is None or (architecture.is_encoder_decoder and start is None):
            raise UserError(
                f"--model {config.model} has no token that ends a text (eos_token) or begins a target "
                "(decoder_start_token_id): set them in its files"
            )
        return tokenizer, embedding_rows(config), start

    def load(self, folder: Path) -> PairData:
        """Open prepared pairs."""
        self._require_package()
        return PairData.load(folder)

    def build(self, config: RunConfig, data: PairData) -> Any:
        """Return the model. In a new T5 the embedding and the output head are one, and there is no dropout."""
        from transformers import T5Config

        from floragrad.cli.train.models import build_model, new_model

        preset = TASKS[self.name].get(config.model)
        if preset is None:
            return build_model(self.auto_class, config, data.facts.vocab_size)
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

    def collate(self, blocks: list[Example]) -> dict[str, Any]:
        """Return a batch of tensors, as long as its longest texts: what is masked costs time."""
        batch = super().collate(blocks)
        source = int(batch["attention_mask"].sum(1).max())
        target = int((batch["labels"] != PADDING).nonzero()[:, 1].max()) + 1
        sides = {"input_ids": source, "attention_mask": source}
        return {name: tokens[:, : sides.get(name, target)] for name, tokens in batch.items()}

    def examine(self, model: Any, batch: Mapping[str, Any]) -> "dict[str, Tensor]":
        """Return the mean cross-entropy, in nats and float32, and the accuracy over each target's tokens."""
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

    def measure(self, model: Any, config: RunConfig, blocks: Examples, processor: Any, move: Any) -> dict[str, float]:
        """Return scores of the likeliest targets, token by token, of the first pairs of the sample."""
        chosen = [blocks[position] for position in range(min(config.generate_blocks, len(blocks)))]
        parts = [chosen[start : start + GENERATED_AT_ONCE] for start in range(0, len(chosen), GENERATED_AT_ONCE)]
        texts = [text for part in parts for text in self._generated(model, config, part, processor, move)]
        references = [block["labels"][block["labels"] != PADDING] for block in chosen]
        return self.score(texts, _decoded(processor, references))

    def _generated(self, model: Any, config: RunConfig, blocks: list[Example], processor: Any, move: Any) -> list[str]:
        """Return a text for each of the sources."""
        if model.config.is_encoder_decoder:
            batch = self.collate(blocks)
            batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        else:
            batch = super().collate(prompts(blocks))
        written = model.generate(
            **move(batch),
            max_new_tokens=config.target_length or config.sequence_length,
            do_sample=False,
            num_beams=1,
            pad_token_id=processor.eos_token_id if processor.pad_token_id is None else processor.pad_token_id,
            eos_token_id=processor.eos_token_id,
        )
        return _decoded(processor, written[:, 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1] :])

    def _require_package(self) -> None:
        """Refuse to begin what could not be measured; the message names the extra."""
        try:
            require(self.package, "train")
        except ImportError as error:
            raise UserError(str(error)) from error


def prompts(blocks: Sequence[Example]) -> list[Example]:
    """Return the sources of blocks that hold source and target in a row, padded on the left to one length."""
    rows = [block["input_ids"][: int((block["labels"] != PADDING).argmax()) + 1] for block in blocks]
    length = max(map(len, rows))
    return [masked(np.pad(row, (length - len(row), 0), constant_values=PADDING)) for row in rows]


def _decoded(processor: Any, rows: Any) -> list[str]:
    return [text.strip() for text in processor.batch_decode(rows, skip_special_tokens=True)]


def bleu(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return sacreBLEU's BLEU of a corpus, in percent."""
    import sacrebleu

    return {"bleu": sacrebleu.corpus_bleu(texts, [references]).score}


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L with stemming, in percent."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGES, use_stemmer=True)
    found = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {name: 100 * fmean(each[name].fmeasure for each in found) for name in ROUGES}
