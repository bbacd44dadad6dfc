"""Numbers and tables in words."""

import pytest

from floragrad._text import format_bytes, format_table


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (430_460, "430.5 kB"), (16.9e6, "16.9 MB"), (2e9, "2.0 GB")],
)
def test_bytes_in_words(count: float, words: str) -> None:
    assert format_bytes(count) == words


def test_columns_are_padded_but_the_last() -> None:
    assert format_table([("name", "why"), ("a", "because"), ("longer", "so")]) == [
        "name    why",
        "---------------",
        "a       because",
        "longer  so",
    ]
