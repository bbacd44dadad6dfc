from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from floragrad.cli.errors import UserError
from floragrad.cli.train.corpus import Corpus, blocks, prepare_corpus, split
from floragrad.cli.train.data import Examples, sampled
from floragrad.cli.train.sources import Documents, read_documents
from tests.cli.train.support import fast_config, load_tokenizer, newest, run

pytestmark = pytest.mark.usefixtures("one_layer")


def served(blocks: Examples) -> list[list[int]]:
    return [blocks[position]["input_ids"].tolist() for position in range(len(blocks))]


def test_validation_blocks_come_in_order_and_once() -> None:
    assert served(Examples(blocks(np.arange(11, dtype=np.uint16), 4), 2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_validation_sample_comes_from_everywhere() -> None:
    chosen = sampled(1385, 128)
    assert len(set(chosen)) == 128
    assert np.array_equal(chosen, np.sort(chosen))
    # A tenth holds 12.8 ± 3.2 of them (hypergeometric); the draw is fixed, so this is no matter of chance.
    assert np.histogram(chosen, bins=10, range=(0, 1385))[0].min() >= 12.8 - 3 * 3.2
    assert set(chosen) < set(sampled(1385, 256)), "a larger sample contains the smaller one"
    assert np.array_equal(sampled(5, 128), np.arange(5))


def test_validation_blocks_are_drawn_from_all_held_out_documents(texts: Path, tmp_path: Path) -> None:
    config = fast_config(texts, eval_blocks=20)
    words = [f"{'abcdefghij'[number // 10]} " * 300 for number in range(100)]
    corpus = prepare_corpus(config, Documents(words, "words"), tmp_path)
    read = served(corpus.validation_blocks(config))
    assert len(read) == 20 < corpus.held_out_blocks(config)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    held_out = "".join(tokenizer.decode(block) for block in read)
    assert len(set("abcdefghij") & set(held_out)) >= 6, "20 draws among ten documents of the same length"
    assert read == served(Corpus.load(tmp_path).validation_blocks(replace(config, seed=7, optimizer="adamw")))


def test_every_pass_serves_every_block_once_in_another_order() -> None:
    tokens = np.arange(80, dtype=np.uint16)
    read = served(Examples(blocks(tokens, 4), 20, seed=3, total=60))
    passes = [read[start : start + 20] for start in (0, 20, 40)]
    for one in passes:
        assert sorted(one) == tokens.reshape(20, 4).tolist()
    assert passes[0] != passes[1] != passes[2]


def test_the_order_depends_on_seed_and_position_alone() -> None:
    tokens = np.arange(80, dtype=np.uint16)
    whole = served(Examples(blocks(tokens, 4), 20, seed=3, total=40))
    started_late = Examples(blocks(tokens, 4), 20, seed=3, total=40)
    assert [started_late[position]["input_ids"].tolist() for position in range(25, 40)] == whole[25:]
    assert started_late[2]["input_ids"].tolist() == whole[2], "going back to an earlier pass"
    assert served(Examples(blocks(tokens, 4), 20, seed=4, total=40)) != whole


def test_labels_are_the_tokens() -> None:
    block = blocks(np.arange(8, dtype=np.uint32), 4)(1)
    assert np.array_equal(block["labels"], block["input_ids"])
    assert block["input_ids"].dtype == np.int64


@pytest.mark.parametrize("count", [1, 9, 10, 25])
def test_the_split_loses_nothing_and_holds_out_a_tenth(count: int) -> None:
    texts = [f"{number:03d}" * 10 for number in range(count)]
    train, validation = split(texts)
    assert sorted("".join(train + validation)) == sorted("".join(texts))
    share = len("".join(validation)) / len("".join(texts))
    assert share == pytest.approx(0.1 if count < 25 else 0.08)
    assert split(texts) == (train, validation)


def test_files_hold_the_texts_with_their_ends(texts: Path, tmp_path: Path) -> None:
    config = fast_config(texts)
    documents = read_documents(config)
    corpus = prepare_corpus(config, documents, tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    train, validation = split(documents.texts)
    for name, part in (("train", train), ("validation", validation)):
        tokens = np.fromfile(tmp_path / f"{name}.bin", dtype=corpus.facts.dtype)
        assert tokenizer.decode(tokens) == "".join(text + tokenizer.eos_token for text in part)
    assert Corpus.load(tmp_path) == corpus
    assert corpus.facts.vocab_size == len(tokenizer) == 300
    assert corpus.facts.megabytes == sum(map(len, documents.texts)) / 1e6


def test_another_text_is_validated_with(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    other = "what is the rate of the loss " * 40
    (tmp_path / "held" / "out.txt").write_text(other)
    (tmp_path / "held" / "zeros.bin").write_bytes(b"a\0b")
    config = fast_config(texts, validation_text=(str(tmp_path / "held"),))
    (tmp_path / "corpus").mkdir()
    corpus = prepare_corpus(config, read_documents(config), tmp_path / "corpus")
    tokenizer, whole = load_tokenizer(corpus.folder / "tokenizer"), read_documents(fast_config(texts)).texts
    for name, part in (("train", whole), ("validation", [other])):
        tokens = np.fromfile(corpus.folder / f"{name}.bin", dtype=corpus.facts.dtype)
        assert tokenizer.decode(tokens) == "".join(text + tokenizer.eos_token for text in part)
    facts = corpus.facts
    assert (facts.documents, facts.skipped) == (len(whole) + 1, 1)
    assert facts.megabytes == sum(map(len, [*whole, other])) / 1e6
    assert facts.validation_source == str(tmp_path / "held")
    assert f"{facts.validation_tokens:,} held out from {tmp_path / 'held'}, vocabulary" in corpus.describe()
    assert Corpus.load(corpus.folder) == corpus
    assert corpus.held_out_blocks(config) == facts.validation_tokens // config.sequence_length


def test_the_tokenizer_never_sees_held_out_text(texts: Path, tmp_path: Path) -> None:
    documents = read_documents(fast_config(texts))
    changed = [text if index % 10 != 9 else text[::-1] for index, text in enumerate(documents.texts)]
    for name, part in (("a", documents.texts), ("b", changed)):
        (tmp_path / name).mkdir()
        prepare_corpus(fast_config(texts), Documents(part, "words"), tmp_path / name)
    assert (tmp_path / "a/tokenizer/tokenizer.json").read_text() == (
        tmp_path / "b/tokenizer/tokenizer.json"
    ).read_text()
    assert (tmp_path / "a/validation.bin").read_bytes() != (tmp_path / "b/validation.bin").read_bytes()


def test_the_tokenizer_of_a_checkpoint_loses_nothing(texts: Path, tmp_path: Path) -> None:
    folder = run(fast_config(texts, steps=1, eval_blocks=1), tmp_path / "run")
    own, saved = load_tokenizer(folder.corpus / "tokenizer"), load_tokenizer(newest(folder))
    for text in ("int naïve = 1;\t\n\n", "\N{SNOWMAN}\0\r\n 数", "<|endoftext|x"):
        assert saved.decode(saved(text)["input_ids"]) == text
        assert saved(text)["input_ids"] == own(text)["input_ids"]


def test_too_little_text_is_refused(tmp_path: Path, texts: Path) -> None:
    config = fast_config(texts, sequence_length=64)
    with pytest.raises(UserError, match=r"the text is too short: \d+ tokens to train on, \d+ held out, one block"):
        prepare_corpus(config, Documents(["the of and to " * 20], "words"), tmp_path)
