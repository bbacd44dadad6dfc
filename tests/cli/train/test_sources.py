import json
import shutil
from pathlib import Path

import pytest

from floragrad.cli.errors import UserError
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.sources import read_documents
from tests.cli.train.support import write_texts


def read(*text: object, **options: object) -> list[str]:
    return read_documents(RunConfig.resolve(text=tuple(map(str, text)), **options)).texts


def test_a_folder_reads_the_same_wherever_it_lies(texts: Path, tmp_path: Path) -> None:
    shutil.copytree(texts, tmp_path / "moved")
    first = read(texts)
    assert first == read(tmp_path / "moved")
    assert len(first) == 12
    assert first != [path.read_text() for path in sorted(texts.iterdir())]


def test_a_file_counts_once(texts: Path) -> None:
    one = texts / "document00.txt"
    assert read(one, texts / "document0[0-1].txt", one) == read(texts / "document0[0-1].txt")


def test_a_pattern_may_cross_folders(texts: Path, tmp_path: Path) -> None:
    shutil.copytree(texts, tmp_path / "deep" / "down")
    assert sorted(read(tmp_path / "**" / "*.txt")) == sorted(read(texts))


def test_hidden_and_binary_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "mixed", documents=2)
    (folder / ".hidden").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden too")
    (folder / "latin1.txt").write_bytes("café".encode("latin-1"))
    (folder / "zeros.bin").write_bytes(b"a\0b")
    (folder / "empty.txt").write_text("\n")
    documents = read_documents(RunConfig.resolve(text=(str(folder),)))
    assert len(documents.texts) == 2
    assert documents.skipped == 2


def test_a_named_file_must_be_text(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin1\.txt is not UTF-8 text .*: convert it, or leave it out"):
        read(path)


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path / "nothing*.txt")
    wanted = f"--text {tmp_path}/nothing*.txt does not exist: give files, folders or patterns like 'books/*.txt'"
    assert str(caught.value) == wanted


def test_a_text_to_validate_with_is_checked_as_the_other(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    for path, message in (
        (tmp_path / "no.txt", rf"--validation-text {tmp_path}/no\.txt does not exist: give files"),
        (tmp_path / "empty.txt", rf"there is no text in {tmp_path}/empty\.txt: give files"),
        (texts / "document03.txt", r"/document03\.txt belongs to --text and to --validation-text: leave it out of one"),
    ):
        with pytest.raises(UserError, match=message):
            read(texts, validation_text=(str(path),))


@pytest.mark.parametrize("content", ["", " \n\t"])
def test_no_text_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(UserError, match=r"there is no text in .*: give files that are UTF-8 and not empty"):
        read(tmp_path)


def test_the_bound_cuts_the_last_text_between_characters(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("é" * 1000, encoding="utf-8")
    assert [len(text) for text in read(tmp_path, max_megabytes=0.003001)] == [1000, 500]


def test_the_default_is_the_standard_library_without_its_tests() -> None:
    documents = read_documents(RunConfig.resolve(max_megabytes=100.0))
    together = "\n".join(documents.texts)
    assert "def dataclass(" in together
    assert "class TestCase(" in together, "unittest is part of the library"
    assert "class DictTest(unittest.TestCase)" not in together, "the library's tests are not"
    bounded = read_documents(RunConfig.resolve())
    size = sum(len(text.encode()) for text in bounded.texts)
    assert 3_999_990 <= size <= 4_000_000
    assert bounded.texts[:-1] == documents.texts[: len(bounded.texts) - 1]


def test_a_dataset_is_read_from_a_folder(tmp_path: Path) -> None:
    rows = [{"body": f"text number {number}", "id": number} for number in range(5)] + [{"body": " ", "id": 9}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig.resolve(dataset=str(tmp_path), text_column="body")
    assert read_documents(config).texts == [row["body"] for row in rows[:5]]
    with pytest.raises(UserError, match=r"--text-column text is no text of .*: its columns are body, id"):
        read_documents(RunConfig.resolve(dataset=str(tmp_path)))


def test_null_rows_of_a_dataset_are_left_out_and_counted(tmp_path: Path) -> None:
    texts = ["first text", None, "second text", None, None, " "]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = read_documents(RunConfig.resolve(dataset=str(tmp_path)))
    assert (documents.texts, documents.skipped) == (["first text", "second text"], 3)


def test_a_column_of_numbers_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"body": "words", "id": 3}\n')
    with pytest.raises(UserError, match=r"--text-column id of .* holds a value of type int, not text: .* body, id"):
        read_documents(RunConfig.resolve(dataset=str(tmp_path), text_column="id"))


def test_a_dataset_that_cannot_be_reached_says_so() -> None:
    with pytest.raises(UserError) as caught:
        read_documents(RunConfig.resolve(dataset="nobody/nothing"))
    message = str(caught.value)
    assert message.startswith("--dataset nobody/nothing cannot be loaded (")
    assert message.endswith("give the name of a dataset that can be reached, a folder with its files, or --text")
    assert "\n" not in message
