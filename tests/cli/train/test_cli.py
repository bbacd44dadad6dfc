import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from floragrad._version import __version__
from floragrad.cli import machine
from tests.cli.train.support import FAST, command, fast_config, read_json, refused, run, tree, write_gpt2, write_texts

pytestmark = pytest.mark.usefixtures("one_layer")

OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a text in it, which must be all there is afterwards."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts")
    return tmp_path


def in_python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--text", "no.txt"], "--text no.txt does not exist: give files, folders or patterns"),
        (["train", "--text", "texts", "--max-megabytes", "0.0001"], "the text is too short: "),
        (["train", "--model", "huge"], "--model huge is unknown: choose one of tiny, small, 60m, 130m, 350m, 1b"),
        (["train", "--model", "texts"], "is unknown: choose one of tiny"),
        (["train", "--backend", "mxnet"], "--backend 'mxnet' is unknown: choose one of torch, jax"),
        (
            ["train", "--backend", "jax", "--model", "texts"],
            "--backend jax trains new Llamas of the sizes tiny, small,",
        ),
        (
            ["train", "--backend", "jax", "--accumulate", "2", "--release"],
            "--release frees gradients inside torch's backward pass: leave it out with --backend jax",
        ),
        (["train", "--backend", "jax", "--rank", "192"], "--rank 192 compresses nothing: "),
        (["train", "--dataset", "nobody/nothing"], "--dataset nobody/nothing cannot be loaded"),
        (["train", "--optimizer", "sgd"], "--optimizer 'sgd' is unknown: choose one of flora, flora-paper, "),
        (["train", "--rank", "192"], "--rank 192 compresses nothing: "),
        (["train", "--steps", "many"], "'many' is not a whole number"),
        (["train", "--lr", "high"], "'high' is not a number"),
        (["train", "--steps", "0"], "--steps is 0: give a whole number of at least 1"),
        (["train", "--stepps", "3"], "No such option: --stepps"),
        (["train", "--steps"], "--steps"),
        (["train", "more"], "Got unexpected extra argument"),
        (["fine-tune"], "No such command 'fine-tune'"),
        (
            ["train", "--fsdp"],
            "--fsdp divides the model over several processes, and this is one: start them with torchrun",
        ),
        (["train", "--timeout", "9"], "--timeout is how long to wait for one of several processes, and this is one: "),
        (
            ["train", "--steps", 10**30],
            f"--steps is {10**30}: give a whole number of at least 1 and at most 2147483647",
        ),
        (["train", "--threads", "5000"], "--threads is 5000: give a whole number of at least 1 and at most 4096"),
        (["train", "--max-megabytes", "1e305"], "--max-megabytes is 1e+305: give a number of at most 1e+12"),
        (["train", "--lr", "1e39"], "--lr is 1e+39: give a number of at most 1e+37"),
        (["train", "--timeout", "0"], "--timeout is 0: give a whole number of at least 1"),
        (["train", "--out", "texts"], "--out texts is not empty: give the name of a new folder"),
        (["train", "--resume", "texts"], "--resume texts holds no run: give a folder that floragrad train has made"),
        (
            ["train", "--resume", "texts", "--steps", "3", "--lr", "1"],
            "--resume continues with the options that were given then, not --steps, --lr: give it alone",
        ),
        (
            ["compare", "--methods", "flora,sgd"],
            "--methods 'sgd' is unknown: choose one of flora, flora-paper, flora-full, ",
        ),
        (["compare", "--methods", "adamw,adamw"], "--methods adamw,adamw names one twice: give each once"),
        (["compare", "--methods", ","], "--methods ',' cannot be read: give a list with commas"),
        (["compare", "--seeds", "0,0"], "--seeds 0,0 names one twice: give each once"),
        (["compare", "--seeds", "a"], "--seeds 'a' cannot be read: give a list with commas, like 0,1,2"),
        (["compare", "--lrs", "1e-3;2e-3"], "--lrs '1e-3;2e-3' cannot be read: give a list with commas"),
        (["compare", "--lrs", "1e-3,0"], "--lr is 0.0: give a number above 0"),
        (["compare", "--rank", "192"], "--rank 192 compresses nothing: "),
        (["compare", "--methods", "adamw", "--rank", "4"], "--rank belongs to flora, which is not compared"),
        (
            ["compare", "--methods", "adamw", "--set", "ratio=2,4"],
            "--set ratio belongs to flora, which is not compared: leave it out",
        ),
        (["compare", "--set", "ratio=2,0"], "--set ratio=0: must be an integer >= 1"),
        (["compare", "--accumulators", "sum"], "--accumulators 'sum' is unknown: choose one of flora, exact, none"),
        (
            ["compare", "--accumulate", "2", "--accumulators", "exact,none", "--accumulator-dtypes", "int8"],
            "--accumulator-dtypes belongs to sketched gradients, which are not compared: leave it out",
        ),
        (
            ["compare", "--resume", "texts"],
            "--resume texts holds no comparison: give a folder that floragrad compare has made",
        ),
        (["compare", "--resume", "texts", "--seeds", "1"], "--resume texts holds no comparison"),
        (["compare", "--resume", "texts", "--steps", "1"], "--resume continues with the options"),
        (["compare", "--text", "no.txt"], "--text no.txt does not exist"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_wrong_request_gets_one_line_and_makes_nothing(
    there: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = tree(there)
    assert message in refused(capsys, *arguments)
    assert tree(there) == before


def test_the_console_script_does_the_same(there: Path) -> None:
    """With a request that is refused before anything is imported, which takes seconds."""
    script = Path(sys.executable).with_name("floragrad")
    result = subprocess.run([script, "train", "--stepps", "3"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("floragrad: No such option: --stepps")
    assert [path.name for path in there.iterdir()] == ["texts"]


def test_an_empty_text_is_refused(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (there / "empty.txt").write_text("")
    assert refused(capsys, "train", "--text", "empty.txt") == (
        "there is no text in empty.txt: give files that are UTF-8 and not empty"
    )


def test_blocks_longer_than_the_model_reads_are_refused(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_gpt2(there / "gpt2", there / "texts")
    message = refused(capsys, "train", "--text", "texts", "--model", model, "--sequence-length", 33, "--rank", 8)
    assert message == f"--sequence-length 33 is more than the 32 positions of {model}: give at most 32"


def test_a_model_without_a_tokenizer_is_refused(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_gpt2(there / "gpt2", there / "texts")
    for path in model.glob("tokenizer*"):
        path.unlink()
    before = tree(there)
    message = refused(capsys, "train", "--text", "texts", "--model", model, "--sequence-length", 32, "--rank", 8)
    assert message.startswith(f"--model {model} has no tokenizer that can be loaded: ")
    assert tree(there) == before


def test_a_model_with_code_of_its_own_is_refused(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, without a question and without running it; as `plan` does."""
    model = write_gpt2(there / "gpt2", there / "texts")
    values = read_json(model / "config.json")
    values |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (model / "config.json").write_text(json.dumps(values))
    (model / "own.py").write_text("raise SystemExit('executed')")
    rest = "brings code of its own (auto_map), which is not executed here: give a model that transformers itself has"
    assert refused(capsys, "train", "--text", "texts", "--model", model) == f"--model {model} {rest}"
    assert refused(capsys, "plan", model) == f"MODEL {model} {rest}"


def test_a_quantized_model_is_refused(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither trained nor planned for as if its weights were float32."""
    model = write_gpt2(there / "gpt2", there / "texts")
    values = read_json(model / "config.json")
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps({**values, "quantization_config": quantization}))
    rest = (
        "is quantized (bitsandbytes), and quantized weights are not trained: give the model that it was made from, "
        "or remove quantization_config from its config.json"
    )
    assert refused(capsys, "train", "--text", "texts", "--model", model) == f"--model {model} {rest}"
    assert refused(capsys, "plan", model) == f"MODEL {model} {rest}"


def test_a_tokenizer_that_the_model_does_not_know_is_refused(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_gpt2(there / "gpt2", there / "texts")
    values = read_json(model / "config.json")
    (model / "config.json").write_text(json.dumps({**values, "vocab_size": 280}))
    before = tree(there)
    said = refused(capsys, "train", "--text", "texts", "--model", model, "--sequence-length", 16, "--rank", 8)
    assert said.startswith(f"--model {model} has an embedding of 280 rows, and its tokenizer makes token ")
    assert said.endswith(" of 300 from this text: save the tokenizer that belongs to the model, or the model after "
                         "resize_token_embeddings")  # fmt: skip
    assert tree(there) == before


def test_a_checkpoint_to_resume_names_its_run(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(fast_config(there / "texts", steps=1), there / "run")
    rest = "is a checkpoint, and a run goes on from its newest one: give the run's folder, --resume"
    assert refused(capsys, "train", "--resume", "run/checkpoint-1") == f"--resume run/checkpoint-1 {rest} run"
    assert refused(capsys, "train", "--resume", "run/checkpoint-7/") == f"--resume run/checkpoint-7 {rest} run"
    monkeypatch.chdir(there / "run")
    assert refused(capsys, "train", "--resume", "checkpoint-1") == f"--resume checkpoint-1 {rest} ."


def test_a_model_is_no_run(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_gpt2(there / "gpt2", there / "texts")
    assert "config.json is not a run's configuration" in refused(capsys, "train", "--resume", model)


def test_a_run_is_never_written_over(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(fast_config(there / "texts", steps=1), there / "run")
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    message = refused(capsys, "train", "--text", "texts", "--out", "run", *OPTIONS)
    assert message == (
        "--out run holds another run: continue that one with floragrad train --resume run, or give the name of a "
        "new folder"
    )
    assert {path: path.read_bytes() for path in there.rglob("*") if path.is_file()} == before


def test_a_run_tells_what_it_does(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "--text", "texts", "--out", "run", *OPTIONS) == 0
    said = capsys.readouterr()
    assert said.err == "", "nothing but what is ours"
    summary = read_json(there / "run" / "summary.json")
    first, *lines = said.out.splitlines()
    assert first == "run folder: run"
    assert lines[0].startswith("tiny: ")
    compressed = next(number for number, line in enumerate(lines) if line.startswith("Flora keeps a sketch of"))
    assert "of 7 of 12 tensors" in lines[compressed]
    begun = next(number for number, line in enumerate(lines) if line.startswith("step 0/8 · validation loss"))
    assert compressed < begun
    assert f"{summary['validation_loss']:.4f} ({100 * -summary['validation_loss_change']:.1f}% lower)" in said.out
    drawn = "validation with 4 of {} held-out blocks, drawn from all held-out documents"
    assert drawn.format(summary["held_out_blocks"]) in lines
    assert f"{summary['standard_error']:.4f} over 4 of {summary['held_out_blocks']} held-out blocks" in said.out
    assert lines[-1] == "everything is in run"


def test_a_finished_run_is_only_shown_again(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(fast_config(there / "texts", steps=1), there / "run")
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert command("train", "--resume", "run") == 0
    assert "validation loss" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in there.rglob("*") if path.is_file()} == before


def test_folders_name_themselves(there: Path) -> None:
    for _ in range(2):
        assert command("train", "--text", "texts", "--optimizer", "adamw", "--steps", 1, *OPTIONS[1:]) == 0
    names = sorted(path.name for path in (there / "runs").iterdir())
    assert len(names) == 2
    assert all(name.startswith("tiny-adamw-2") and "Z" in name for name in names)


def test_a_diverged_run_fails_without_a_traceback(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--lr", "1e30", "--max-grad-norm", 0, "--warmup-steps", 1]
    assert command("train", "--text", "texts", "--out", "run", *arguments, *OPTIONS) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("floragrad: the loss is not a finite number any more at step")


@pytest.mark.parametrize("option", ["--model", "--dataset"])
def test_a_hub_that_cannot_be_reached_is_not_asked(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """Its client reads the environment when it is imported, which is after it was set."""
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    seen: dict[str, str | None] = {}
    monkeypatch.setattr(machine, "require", lambda module, _: seen.update({module: os.environ.get("HF_HUB_OFFLINE")}))
    assert refused(capsys, "train", option, "nobody/nothing").startswith(f"{option} nobody/nothing ")
    assert {"transformers", "datasets"} <= seen.keys()
    assert set(seen.values()) == {"1"}


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--model", "--dataset"])
def test_a_hub_that_cannot_be_reached_is_not_waited_for(
    there: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = in_python(
        f"from floragrad.cli import main; import sys; code = main(['train', {option!r}, 'nobody/nothing'])\n"
        "import huggingface_hub.constants; assert huggingface_hub.constants.HF_HUB_OFFLINE\n"
        "sys.exit(code)"
    )
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"floragrad: {option} nobody/nothing ")
    assert [path.name for path in there.iterdir()] == ["texts"]


def test_several_processes_are_refused(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "this is one of 2 processes, and only floragrad train takes several, with --backend torch"
    assert refused(capsys, "compare", "--text", "texts").startswith(message)
    assert refused(capsys, "train", "--text", "texts", "--backend", "jax").startswith(message)


def test_processes_that_do_not_know_one_another_are_refused(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert refused(capsys, "train", "--text", "texts") == (
        "this is one of 2 processes (WORLD_SIZE), and LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not "
        "set: start them with torchrun --nproc-per-node 2 -m floragrad train"
    )


def test_help_needs_no_torch() -> None:
    result = in_python(
        "import sys, floragrad.cli\n"
        "assert not {'torch', 'transformers', 'typer'} & sys.modules.keys()\n"
        "assert floragrad.cli.main(['train', '--help']) == 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'tokenizers', 'matplotlib'} & sys.modules.keys()"
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "--rank" in result.stdout


EXTRAS = {
    **{(name, "torch"): "train" for name in ("typer", "torch", "transformers", "datasets", "tokenizers", "matplotlib")},
    **{(name, "jax"): "train-jax" for name in ("jax", "optax", "flax", "transformers")},
}


@pytest.fixture(scope="module")
def without() -> dict[str, list[Any]]:
    """The exit code and the streams of a command where a module is missing, each with floragrad imported anew.

    In one interpreter: the libraries that are there take seconds to import.
    """
    result = in_python(
        f"""
import contextlib, io, json, sys
found = {{}}
for module, backend in {list(EXTRAS)!r}:
    for name in [name for name in sys.modules if name.partition(".")[0] == "floragrad"]:
        del sys.modules[name]
    kept = sys.modules.get(module)
    sys.modules[module] = None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        from floragrad.cli import main
        code = main(["train", "--text", "no.txt", "--backend", backend])
    found[f"{{module}} {{backend}}"] = code, out.getvalue(), err.getvalue()
    del sys.modules[module]
    if kept is not None:
        sys.modules[module] = kept
print(json.dumps(found))
"""
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, list[Any]] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(("module", "backend"), EXTRAS)
def test_a_missing_extra_is_named(without: dict[str, list[Any]], module: str, backend: str) -> None:
    extra = EXTRAS[module, backend]
    said = f"{module} is not installed, and this part of floragrad needs it: pip install 'floragrad[{extra}]'\n"
    assert without[f"{module} {backend}"] == [2, "", f"floragrad: {said}"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "-h"], ["compare", "--help"]], ids=" ".join)
def test_help_is_no_error(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert command(*arguments) == 0
    said = capsys.readouterr()
    assert "Usage: floragrad" in said.out
    assert said.err == ""


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--version") == 0
    assert capsys.readouterr().out == f"floragrad {__version__}\n"
