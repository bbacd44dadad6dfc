import pytest

from floragrad.cli.plan.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "nbytes", "words"),
    [
        ("24GB", 24 * 10**9, "24 GB"),
        ("80 GiB", 80 * 2**30, "85.9 GB (80 GiB)"),
        ("24G", 24 * 10**9, "24 GB"),
        ("24g", 24 * 10**9, "24 GB"),
        ("24 gb", 24 * 10**9, "24 GB"),
        ("24Gi", 24 * 2**30, "25.8 GB (24 GiB)"),
        ("900M", 900 * 10**6, "900 MB"),
        ("2t", 2 * 10**12, "2 TB"),
        ("1.5tb", 15 * 10**11, "1.5 TB"),
        ("640kB", 640_000, "640 kB"),
        (" 512MIB ", 512 * 2**20, "536.9 MB (512 MiB)"),
    ],
)
def test_a_size_is_a_number_and_a_unit(text: str, nbytes: int, words: str) -> None:
    assert parse_size(text) == (nbytes, words)


@pytest.mark.parametrize(
    "text", ["24", "GB", "24B", "24i", "24 iB", "-1GB", "24GX", "24 G B", "0GB", "0.0 MiB", "1e3GB", "", "∞GB"]
)
def test_anything_else_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size: give a number above 0 and one of kB, .*, like 24GB") as refused:
        parse_size(text)
    assert str(refused.value).startswith(repr(text))
