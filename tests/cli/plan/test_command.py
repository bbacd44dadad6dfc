"""``floragrad plan`` from its options to what it prints, on models that take a second."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from floragrad._text import format_bytes
from floragrad.cli.plan.engine import plan as plan_of
from floragrad.cli.plan.result import CATEGORIES, MemoryPlan
from tests.cli.train.support import command
from tests.marks import slow

SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAST = ("--optimizers", "adamw,flora")


@pytest.fixture(autouse=True)
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """``test_recipe.py`` has what is searched for with ``--fits``; it takes several traces."""
    monkeypatch.setattr("floragrad.cli.plan.recipe.find_recipe", lambda *_: None)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a small Llama's configuration."""
    monkeypatch.chdir(tmp_path)
    LlamaConfig(**SMALL).save_pretrained(tmp_path / "llama")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: object, exit_code: int = 0) -> str:
    """What a plan prints, and nothing beside it."""
    capsys.readouterr()
    assert command("plan", *arguments) == exit_code
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
        (("gpt2", "--rank", 0), "--rank is 0: give a whole number of at least 1"),
        (("gpt2", "--batch", 0), "--batch is 0: give a whole number of at least 1"),
        (("gpt2", "--batch", "many"), "'many' is not a whole number"),
        (("gpt2", "--sequence-length", 1025), "--sequence-length 1025 is more than the 1024 positions of MODEL gpt2"),
        (("vit-b-16", "--sequence-length", 8), "--sequence-length 8 belongs to models of text"),
        (("gpt2", "--dtype", "float64"), "--dtype 'float64' is unknown: choose one of float32, bfloat16"),
        (
            ("gpt2", "--state-dtype", "int2"),
            "--state-dtype 'int2' is unknown: choose one of float32, bfloat16, int8, int4",
        ),
        (("gpt2", "--optimizers", "adamw,sgd"), "--optimizers 'sgd' is unknown: choose one of adamw, "),
        (("gpt2", "--optimizers", ","), "--optimizers ',' cannot be read: give a list with commas, like adamw,flora"),
        (("gpt2", "--ddp", 2, "--fsdp", 2), "--ddp=2 and fsdp=2: give one of them"),
        (("gpt2", "--picture", "no/plan.png"), "--picture no/plan.png lies in no folder that is there: make no"),
        (("gpt2", "--picture", "plan.docx"), "--picture plan.docx names no kind of picture that can be drawn: give a"),
        (("gpt2", "--picture", "plan"), "--picture plan names no kind of picture that can be drawn: give a file that"),
        (("gpt2", "--picture", "llama"), "--picture llama is a folder: give a file, like llama/plan.png"),
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


@pytest.fixture(scope="module")
def planned() -> MemoryPlan:
    """The plan of the small Llama and :data:`FAST` with the defaults of the command line."""
    return plan_of(LlamaConfig(**SMALL), optimizers=("adamw", "flora"), sequence=64, rank=16)


def test_the_table_is_the_plan(there: Path, capsys: pytest.CaptureFixture[str], planned: MemoryPlan) -> None:
    shown = said(capsys, "llama", *FAST, "--fits", "1GB")
    lines = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.count("│") > 5}
    assert shown.startswith("llama: batch 1 x 64 tokens, float32")
    for name, row in planned.optimizers.items():
        cells = [cell.strip() for cell in lines[name].split("│")[1:-1]]
        sizes = (row.parameters, row.gradients, row.accumulation, row.optimizer_state, row.activations)
        assert cells == [name, *map(format_bytes, (*sizes, row.temporaries, row.peak)), row.peak_moment]
        assert f"fits 1 GB with {format_bytes(10**9 - row.peak)} to spare" in shown


def test_json_is_one_object_of_integers(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--batch", 2, "--sequence-length", 8, "--accumulate", 3, "--dtype", "bfloat16", "--checkpointing")
    flora = ("--rank", 4, "--state-dtype", "int4")
    found = json.loads(said(capsys, "llama", *FAST, *options, *flora, "--fits", "1MB", "--json"))
    planned = plan_of(
        "llama",
        batch=2,
        sequence=8,
        accumulate=3,
        dtype="bfloat16",
        checkpointing=True,
        rank=4,
        state_dtype="int4",
        optimizers=("adamw", "flora"),
    )
    fits = found.pop("fits")
    assert found == json.loads(json.dumps(planned.to_json()))
    assert found["model"] == "llama"
    for name, row in planned.optimizers.items():
        assert {category: type(found["optimizers"][name][category]) for category in CATEGORIES} == dict.fromkeys(
            CATEGORIES, int
        )
        assert fits["optimizers"][name] == {"fits": row.peak <= 10**6, "spare": 10**6 - row.peak}
    assert fits["memory"] == 10**6


@pytest.mark.parametrize("picture", ["plan.JPG", slow("plan.png"), slow("plan.svg")])
def test_the_exit_code_says_whether_anything_fits(
    there: Path, capsys: pytest.CaptureFixture[str], planned: MemoryPlan, picture: str
) -> None:
    """A picture is drawn either way, in the format of its name."""
    adamw, flora = (planned.optimizers[name].peak for name in ("adamw", "flora"))
    assert flora < adamw
    between = f"{(adamw + flora) // 2 / 1000}k"
    assert "does not fit" in said(capsys, "llama", *FAST, "--fits", between), "one of them does"
    shown = said(capsys, "llama", *FAST, "--fits", f"{flora / 2000}k", "--picture", picture, exit_code=1)
    assert "fits" not in shown.replace("does not fit", "")
    begins = {"png": b"\x89PNG", "jpg": b"\xff\xd8\xff", "svg": b"<?xml"}
    assert (there / picture).read_bytes().startswith(begins[picture[-3:].lower()])
    assert sorted(path.name for path in there.iterdir()) == ["llama", picture]


def test_a_size_in_powers_of_1024_is_said_in_the_units_of_all_others(
    there: Path, capsys: pytest.CaptureFixture[str], planned: MemoryPlan
) -> None:
    spare = format_bytes(2**30 - planned.optimizers["flora"].peak)
    assert f"fits 1.1 GB (1 GiB) with {spare} to spare" in said(capsys, "llama", "--optimizers", "flora", "--fits=1gi")


def test_a_row_whose_package_is_missing_says_so(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    found = json.loads(said(capsys, "llama", "--optimizers", "galore,flora", "--json"))
    assert list(found["optimizers"]) == ["flora"]
    assert found["unavailable"].keys() == {"galore"}
    assert "galore_torch" in found["unavailable"]["galore"]
    assert "galore_torch" in said(capsys, "llama", "--optimizers", "galore,flora")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, floragrad.cli\n"
        "assert floragrad.cli.main(['plan', '--help']) == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "llama-3-8b" in result.stdout
