import gzip
import json
import sys
from pathlib import Path

import pytest

from floragrad.cli.errors import UserError
from floragrad.cli.train.tasks import TASKS, pairs
from floragrad.cli.train.tasks.pair_data import END, PADDING
from floragrad.cli.train.tasks.pairs import entry, read_pairs
from tests.cli.train.task_data import made_up, task_config, write_dictionary

__all__ = ["made_up"]

ENTRIES = [
    ("Abend /ˈaːbənt/ <masc>\nevening <n>, night <n>\n", ("Abend", "evening")),
    ("Billiglohnländer /b/ <pl>\nlow-wage countries\n   Synonym: {x}\n", ("Billiglohnländer", "low-wage countries")),
    ("Gär… /ɡ/ <adj>\n [agr.]  [chem.] fermentable <adj>, fermentative\n", ("Gär…", "fermentable")),
    ("an / aus /a/\non / off\n", ("an / aus", "on / off")),
    ("Ja, gut. /j/\nYes, fine.\n         Note: so\n", ("Ja, gut.", "Yes, fine.")),
    ("section <n>\nPar. <n>s.,  /ˈɛs/\n", ("section", "Par. s.")),
    ("nichts /n/\n", ("nichts", "")),
]


@pytest.mark.parametrize(("text", "wanted"), ENTRIES)
def test_an_entry_gives_its_headword_and_its_first_translation(text: str, wanted: tuple[str, str]) -> None:
    assert entry(text) == wanted


def test_a_dictionary_gives_each_headword_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = [text for text, _ in ENTRIES] + ["Abend /ə/\nsecond\n", "x" * 5000 + "\nlong\n"]
    monkeypatch.setattr(pairs, "DICTIONARY", write_dictionary(tmp_path / "dictd", written))
    found, _ = read_pairs(task_config("seq2seq"))
    heads = [head for head, _ in found]
    assert sorted(heads) == sorted({head for head, target in (pair for _, pair in ENTRIES) if target} | {"x" * 5000})
    assert dict(found)["Gär…"] == "fermentable"
    assert read_pairs(task_config("seq2seq")).pairs == found, "the order is always the same"
    assert len(read_pairs(task_config("seq2seq", max_megabytes=0.00001)).pairs) < len(found)


@pytest.mark.parametrize("damage", ["index", "cut", "text"])
def test_a_damaged_dictionary_is_refused(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stem = write_dictionary(tmp_path / "dictd", [text for text, _ in ENTRIES])
    monkeypatch.setattr(pairs, "DICTIONARY", stem)
    index, text = stem.with_name("made-up.index"), stem.with_name("made-up.dict.dz")
    if damage == "index":
        index.write_text("Abend\t??\t!!\n", encoding="utf-8")
    else:
        text.write_bytes(text.read_bytes()[:-20] if damage == "cut" else gzip.compress(b"\xff" * 500))
    with pytest.raises(UserError, match=r"made-up\.\* is no dictionary of dictd \(.*\): apt-get install"):
        read_pairs(task_config("seq2seq"))


def test_a_datasets_columns_may_be_parts_of_one(tmp_path: Path) -> None:
    rows = [{"translation": {"de": f"Satz {n}", "en": f"sentence {n}"}} for n in range(3)]
    rows += [{"translation": {"de": None, "en": "nothing"}}, rows[0]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = [(f"Satz {n}", f"sentence {n}") for n in range(3)]
    assert read_pairs(task_config("seq2seq", dataset=str(tmp_path))).pairs == wanted
    message = "no texts in --source-column translation.fr and .*: its columns are translation.de, translation.en"
    with pytest.raises(UserError, match=message):
        read_pairs(task_config("seq2seq", dataset=str(tmp_path), source_column="translation.fr"))


@pytest.mark.usefixtures("made_up")
def test_a_block_is_a_pair_of_texts(tmp_path: Path) -> None:
    config = task_config("seq2seq")
    data = TASKS["seq2seq"].prepare(config, tmp_path / "corpus")
    tokenizer = data.processor
    block = data.train_blocks(config)[0]
    source, target = block["input_ids"], block["labels"]
    kept = target[target != PADDING].tolist()
    assert kept[-1] == END not in kept[:-1]
    assert block["decoder_input_ids"][: len(kept)].tolist() == [END, *kept[:-1]]
    assert block["attention_mask"].sum() == (source != END).sum() + 1
    found = dict(read_pairs(config).pairs)
    assert found[tokenizer.decode(source, skip_special_tokens=True)] == tokenizer.decode(kept[:-1])


@pytest.mark.usefixtures("made_up")
def test_texts_that_are_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    task = TASKS["seq2seq"]
    with pytest.raises(UserError, match=r"has 0 pairs to train on and 0 held out of at most 2 tokens: give more"):
        task.prepare(task_config("seq2seq", sequence_length=2), tmp_path / "none")
    facts = task.prepare(task_config("seq2seq", sequence_length=8, vocab_size=300), tmp_path / "some").facts
    assert facts.skipped > 0
    assert facts.train_pairs + facts.held_out_pairs + facts.skipped == len(read_pairs(task_config("seq2seq")).pairs)


@pytest.mark.usefixtures("made_up")
def test_sacrebleu_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"sacrebleu is not installed, .*: pip install 'floragrad\[train\]'"):
        TASKS["seq2seq"].prepare(task_config("seq2seq"), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
