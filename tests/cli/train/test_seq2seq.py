"""Models of Hugging Face on pairs of texts: how they read them, and the scores of what they generate."""

import sys
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import GPT2Config, T5Config, T5ForConditionalGeneration, ViTConfig

from floragrad.cli.errors import UserError
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.corpus import train_tokenizer
from floragrad.cli.train.models import trained_model
from floragrad.cli.train.run import begin
from floragrad.cli.train.tasks import TASKS, pairs
from floragrad.cli.train.tasks.pair_data import END, PADDING, PairData
from floragrad.cli.train.tasks.pairs import read_descriptions
from tests.cli.train.support import assert_same_run, interrupt, newest, run
from tests.cli.train.task_data import WORDS, made_up, write_descriptions, write_dictionary

__all__ = ["made_up"]

pytestmark = pytest.mark.usefixtures("made_up")
OPTIONS: dict[str, Any] = {
    **{"batch_size": 8, "eval_blocks": 10, "generate_blocks": 6, "threads": 1, "rank": 8},
    **{"eval_every": 2, "save_every": 4},
}
GPT2 = {**OPTIONS, "task": "seq2seq", "source_prefix": "translate German to English: ", "source_suffix": " English: "}
T5 = {**OPTIONS, "task": "summarization", "source_prefix": "summarize: ", "sequence_length": 16, "target_length": 6}
UNEVEN = [f"{' '.join(list(WORDS)[n % 6 :])} {n} /a/\n{' '.join(list(WORDS.values())[n % 6 :])}\n" for n in range(120)]
"""Entries of a dictionary, of one to six words."""
CASES = pytest.mark.parametrize("kind", ["gpt2", "t5"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A GPT-2 without weights, and a T5 with weights whose start and end of a text are two tokens."""
    folder = tmp_path_factory.mktemp("models")
    words = [f"translate German to English: summarize: {' '.join([*WORDS, *WORDS.values()])}"] * 9
    tokenizer = train_tokenizer(words, 330)
    for name in ("gpt2", "t5"):
        if name == "t5":
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.save_pretrained(folder / name)
    sizes = {"n_embd": 48, "n_layer": 1, "n_head": 2, "n_positions": 96, "attn_pdrop": 0.0}
    GPT2Config(vocab_size=330, bos_token_id=0, eos_token_id=0, **sizes).save_pretrained(folder / "gpt2")
    widths = {"d_model": 48, "d_kv": 24, "d_ff": 64, "num_heads": 2, "num_layers": 1, "dropout_rate": 0.0}
    ids = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id, "eos_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **widths, **ids)).save_pretrained(folder / "t5")
    return {name: str(folder / name) for name in ("gpt2", "t5")}


def config_of(kind: str, models: dict[str, str], **options: Any) -> RunConfig:
    chosen = GPT2 if kind == "gpt2" else T5
    return RunConfig.resolve(model=models[kind], **{"sequence_length": 48, **chosen, "steps": 4, **options})


def prepared(config: RunConfig, folder: Path) -> PairData:
    return TASKS[config.task].prepare(config, folder / "corpus")


def test_a_causal_model_reads_the_prompt_and_learns_the_target(models: dict[str, str], tmp_path: Path) -> None:
    config = config_of("gpt2", models)
    data = prepared(config, tmp_path)
    block, tokenizer = data.train_blocks(config)[0], data.processor
    known = block["attention_mask"] == 1
    counted = block["labels"] != PADDING
    source, target = tokenizer.decode(block["input_ids"][known]).rsplit(" English:", 1)
    assert source.startswith("translate German to English: ")
    assert dict(pairs.read_pairs(config).pairs)[source.removeprefix("translate German to English: ")] == target[1:]
    assert tokenizer.decode(block["labels"][counted]) == f"{target}{tokenizer.eos_token}"
    # A label is the token after the one at its place.
    assert block["labels"][counted][:-1].tolist() == block["input_ids"][known][-counted.sum() + 1 :].tolist()


def test_an_encoder_decoder_gets_its_own_tokens_and_cut_sources(models: dict[str, str], tmp_path: Path) -> None:
    config = config_of("t5", models)
    data = prepared(config, tmp_path)
    block, tokenizer = data.train_blocks(config)[0], data.processor
    assert block["input_ids"][-1] == tokenizer.eos_token_id == END
    assert block["attention_mask"].all()
    source = tokenizer.decode(block["input_ids"], skip_special_tokens=True)
    assert source.startswith("summarize: ")
    target = block["labels"][block["labels"] != PADDING]
    assert target[-1] == tokenizer.eos_token_id
    assert block["decoder_input_ids"][: len(target)].tolist() == [tokenizer.pad_token_id, *target[:-1]]
    assert data.facts.skipped == 0
    summary = tokenizer.decode(target, skip_special_tokens=True)
    assert source.removeprefix("summarize: ").startswith(summary)


def greedy(model: Any, block: dict[str, Any], start: int | None, length: int) -> list[int]:
    """Return the likeliest tokens after one source, each from a whole pass without padding and cache."""
    known = torch.tensor(block["input_ids"][block["attention_mask"] == 1])[None]
    if start is None:
        known = known[:, : int((block["labels"] != PADDING).argmax()) + 1]
    written: list[int] = []
    while len(written) < length and END not in written:
        tail = torch.tensor([written], dtype=torch.long)
        if start is None:
            logits = model(input_ids=torch.cat([known, tail], 1)).logits
        else:
            begun = torch.cat([torch.tensor([[start]]), tail], 1)
            logits = model(input_ids=known, decoder_input_ids=begun).logits
        written.append(int(logits[0, -1].argmax()))
    return written


@CASES
def test_scores_are_those_of_greedy_texts(
    kind: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "DICTIONARY", write_dictionary(tmp_path / "dictd", UNEVEN))
    config = config_of(kind, models, steps=40, lr=5e-3, embedding_lr=5e-3, eval_every=40, save_every=40)
    folder = run(config, tmp_path / "run")
    summary, data = folder.summary(), TASKS[config.task].load(folder.corpus)
    assert summary is not None
    assert summary["validation_loss"] < 0.8 * summary["first_validation_loss"]
    model = trained_model(TASKS[config.task].auto_class, config, newest(folder)).eval()
    assert model.config.is_encoder_decoder == (kind == "t5")
    blocks = list(map(data.validation_blocks(config).__getitem__, range(6)))
    length = config.target_length or 0
    with torch.no_grad():
        ids = [greedy(model, block, data.facts.start, length) for block in blocks]
    texts, references = (
        [data.processor.decode(tokens, skip_special_tokens=True).strip() for tokens in rows]
        for rows in (ids, [block["labels"][block["labels"] != PADDING] for block in blocks])
    )
    if kind == "gpt2":
        assert summary["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score)
        assert summary["bleu"] > 0
        return
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    found = [scorer.score(*pair) for pair in zip(references, texts, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert summary[name] == pytest.approx(100 * sum(each[name].fmeasure for each in found) / 6)
    assert summary["rouge1"] > 0


@CASES
def test_an_interrupted_run_ends_as_if_it_had_not_been(kind: str, models: dict[str, str], tmp_path: Path) -> None:
    config = config_of(kind, models, eval_every=2)
    assert_same_run(interrupt(config, tmp_path / "stopped", 2), run(config, tmp_path / "whole"))


def test_weights_are_those_of_the_model(models: dict[str, str], tmp_path: Path) -> None:
    config = config_of("t5", models)
    built = TASKS["summarization"].build(config, prepared(config, tmp_path))
    wanted = T5ForConditionalGeneration.from_pretrained(models["t5"])
    assert all(map(torch.equal, built.parameters(), wanted.parameters()))


def test_what_cannot_be_trained_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"48 with --target-length 49 is more than the 96 positions of .*at most 96"):
        begin(config_of("gpt2", models, target_length=49), tmp_path / "run")
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="is a vit, and that is no causal language model: give one that is"):
        begin(config_of("gpt2", {"gpt2": str(tmp_path / "vit")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_package_of_the_scores_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(UserError, match=r"rouge_score is not installed, .*: pip install 'floragrad\[train\]'"):
        TASKS["summarization"].prepare(RunConfig.resolve(task="summarization"), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_descriptions_come_mixed_and_compressed_ones_through_apt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_descriptions(tmp_path / "lists")
    found = list(read_descriptions(folder))
    assert all(text.startswith(synopsis) and len(text.split()) == 12 for text, synopsis in found)
    (plain,) = folder.iterdir()
    assert [synopsis for _, synopsis in found] != [
        line.partition(": ")[2] for line in plain.read_text().splitlines() if line.startswith("Description-en")
    ]
    plain.rename(plain.with_name(f"{plain.name}.lz4"))
    helper = tmp_path / "apt-helper"
    helper.write_text('#!/bin/sh\ntest "$1" = cat-file && cat "$2"\n')
    helper.chmod(0o755)
    monkeypatch.setattr("floragrad.cli.train.tasks.pairs._READER", str(helper))
    assert list(read_descriptions(folder)) == found
    helper.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UserError, match=r"Translation-en\.lz4 is no list of apt's \(.*\): write it again with apt-get"):
        list(read_descriptions(folder))
