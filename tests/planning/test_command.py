"""``floragrad plan`` from its options to what it prints, on models that take a second."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.train.support import command

SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAST = ("--optimizers", "adamw,flora")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a small Llama's configuration."""
    monkeypatch.chdir(tmp_path)
    LlamaConfig(**SMALL).save_pretrained(tmp_path / "llama")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a plan prints, and nothing beside it."""
    capsys.readouterr()
    assert command("plan", *arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a wrong request gets."""
    capsys.readouterr()
    assert command("plan", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("floragrad: ")
    return line.removeprefix("floragrad: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument 'MODEL'"),
        (("nobody/nothing",), "MODEL nobody/nothing is unknown: give a preset (floragrad plan --help lists them)"),
        (("llama/no.json",), "MODEL llama/no.json is unknown: "),
        (("gpt2", "--fits", "24"), "'24' is no size: give a number above 0 and one of kB, MB, GB, TB"),
        (("gpt2", "--fits", "much"), "'much' is no size"),
        (("gpt2", "--fits", "0GB"), "'0GB' is no size"),
        (("gpt2", "--rank", 10_000), "--rank 10000 is too large for MODEL gpt2: "),
        (("gpt2", "--rank", 0), "'0' is not a whole number of at least 1"),
        (("gpt2", "--batch", 0), "'0' is not a whole number of at least 1"),
        (("gpt2", "--batch", "many"), "'many' is not a whole number of at least 1"),
        (("gpt2", "--sequence-length", 1025), "--sequence-length 1025 is more than the 1024 positions of MODEL gpt2"),
        (("vit-b-16", "--sequence-length", 8), "--sequence-length 8 belongs to models of text"),
        (("gpt2", "--dtype", "float64"), "--dtype='float64': must be one of float32, bfloat16"),
        (("gpt2", "--state-dtype", "int2"), "--state-dtype='int2': must be one of float32, bfloat16, int8, int4"),
        (("gpt2", "--optimizers", "adamw,sgd"), "--optimizers='sgd': must be one of adamw, "),
        (("gpt2", "--optimizers", ","), "--optimizers is empty: choose from adamw, "),
        (("gpt2", "--ddp", 2, "--fsdp", 2), "--ddp=2 and fsdp=2: give one of them"),
        (("gpt2", "--largest"), "--largest looks for what fits a device, and none is given: add one, like --fits 24GB"),
        (("gpt2", "--picture", "no/plan.png"), "--picture no/plan.png lies in no folder that is there: make no"),
        (("mixtral-8x7b", "--dtype", "float32"), "MODEL mixtral-8x7b is a mixture of experts"),
        (("gpt2", "gpt2-xl"), "Got unexpected extra argument"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_wrong_request_gets_one_line_and_makes_nothing(
    there: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[Any, ...], message: str
) -> None:
    before = sorted(there.rglob("*"))
    assert message in refused(capsys, *arguments)
    assert sorted(there.rglob("*")) == before
