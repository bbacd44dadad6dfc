"""Real torchrun: several processes train what one would have, and stop, die and go on like one.

All runs of Flora have float32 states, so that two of them differ by the order in which numbers are summed: by 1e-7 of
the loss, where a block that is read twice or not at all changes it by 1e-2.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from floragrad.cli.errors import StoppedError
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.run import begin
from floragrad.cli.train.run import train as train_here
from tests.cli.train.support import (
    FAST,
    Meddler,
    assert_same_run,
    command,
    fast_config,
    newest,
    read_json,
    run,
    saved_state,
    write_gpt2,
)
from tests.cli.train.test_interrupt import wait_for_step

pytestmark = [
    pytest.mark.xdist_group("torchrun"),  # one at a time: all of them meet at torchrun's default port
    pytest.mark.usefixtures("one_layer"),
]

TORCHRUN = Path(sys.executable).with_name("torchrun")
ROOT = Path(__file__).parents[3]
PATIENCE = 300.0
"""Seconds after which a test gives up; nothing is measured with it."""
TOLERANCE = 1e-5
TOLERANCES = {"adamw": 1e-3}
"""AdamW divides by the root of what a gradient was, and makes a step of its rounding where that is nearly zero."""
HALF, STEPS = 4, 8
JOB = {**FAST, "steps": STEPS, "batch_size": 4, "eval_every": 3, "save_every": 100, "eval_blocks": 5}
"""Five held-out blocks are a batch and one block, which is nobody's but the first process's."""
HALFWAY = {"signal": [1, HALF - 1]}
"""The second process alone is asked to stop."""
GPT2 = {"rank": 8, "lr": 1e-3}
"""Options of a model from a folder."""
WAYS: dict[str, dict[str, Any]] = {
    "flora": {"state_dtype": "float32"},
    "adamw": {"optimizer": "adamw"},
    "exact": {"state_dtype": "float32", "batch_size": 2, "accumulate": 2, "accumulator": "exact"},
    "sketched": {"state_dtype": "float32", "batch_size": 2, "accumulate": 2, "accumulator_dtype": "float32"},
}


def job(out: Path, texts: Path, *flags: str, model: Path | None = None, **chosen: Any) -> list[str]:
    """A run that takes a second, as a command line."""
    given = {"text": texts, "out": out, **JOB, **chosen}
    if model is not None:
        given["model"] = model
        del given["vocab_size"]
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items()), *flags]


def start(size: int, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(TORCHRUN), "--nproc-per-node", str(size), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


@dataclass
class Session:
    """What a torchrun has done with several jobs, one after another."""

    folder: Path
    codes: dict[str, int]
    output: str
    errors: str
    returncode: int

    def run(self, name: str) -> RunFolder:
        return RunFolder.open(self.folder / name)

    def said(self, name: str) -> str:
        """What one job has written to stderr."""
        return self.errors.split(f"job {name}\n")[1].split("job ")[0]


def session(folder: Path, size: int, jobs: dict[str, dict[str, Any]]) -> Session:
    """Do jobs in one torchrun; all ranks have to agree on each exit code."""
    plan = folder / f"plan-{size}" / "plan.json"
    plan.parent.mkdir()
    plan.write_text(json.dumps(jobs))
    process = start(size, "-m", "tests.cli.train.torchrun_session", plan)
    output, errors = process.communicate(timeout=PATIENCE)
    codes = [read_json(plan.with_name(f"codes-{rank}.json")) for rank in range(size)]
    assert all(codes[0].items() <= each.items() for each in codes), (codes, errors)
    return Session(folder, codes[0], output, errors, process.returncode)


def assert_close(found: RunFolder, expected: RunFolder, tolerance: float = TOLERANCE) -> None:
    """The same steps, tokens, losses and weights, but for rounding."""
    assert_close_losses(found, expected, tolerance)
    weights, others = (load_file(newest(each) / "model.safetensors") for each in (found, expected))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert (weight - others[name]).abs().max() <= tolerance * others[name].abs().max(), name


def assert_close_losses(found: RunFolder, expected: RunFolder, tolerance: float = TOLERANCE) -> None:
    """The same steps, tokens and losses, but for rounding."""
    for line, other in zip(found.metrics(), expected.metrics(), strict=True):
        assert line.keys() == other.keys()
        for name in ("step", "tokens", "lr", "embedding_lr"):
            assert line.get(name) == other.get(name)
        for name in line.keys() & {"loss", "validation_loss", "grad_norm"}:
            assert line[name] == pytest.approx(other[name], rel=tolerance), (name, line["step"])
        # Each block's loss, rounded to six places, whichever process has computed it.
        if "block_losses" in other:
            assert line["block_losses"] == pytest.approx(other["block_losses"], rel=tolerance, abs=1e-6)


class Alone(dict[str, RunFolder]):
    """The runs as one process makes them, when they are asked for."""

    def __init__(self, texts: Path, folder: Path) -> None:
        super().__init__()
        self._texts, self._folder = texts, folder

    def __missing__(self, name: str) -> RunFolder:
        self[name] = run(fast_config(self._texts, **{**JOB, **WAYS[name]}), self._folder / name)
        return self[name]


@pytest.fixture(scope="module")
def one(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(texts, tmp_path_factory.mktemp("one"))


@dataclass
class Jobs:
    """Jobs of two processes in one folder."""

    texts: Path
    folder: Path

    def stopped(self, name: str) -> None:
        """Stop a run of one process halfway."""
        folder = begin(fast_config(self.texts, **JOB, **WAYS["flora"]), self.folder / name)
        with pytest.raises(StoppedError):
            train_here(folder, Meddler(HALF - 1, signal.SIGINT))

    def new(self, name: str, *flags: str, **chosen: Any) -> list[str]:
        return job(self.folder / name, self.texts, *flags, **chosen)

    def resume(self, name: str, *flags: str) -> list[str]:
        return ["train", "--resume", str(self.folder / name), *flags]


@pytest.fixture(scope="module")
def two(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Two processes, and what they do in the tests that always run; at last the first one is killed."""
    jobs = Jobs(texts, tmp_path_factory.mktemp("two"))
    jobs.stopped("one-half-fsdp")
    dropout = write_gpt2(jobs.folder / "dropout-model", texts, dropout=0.3)
    return session(
        jobs.folder,
        2,
        {
            "flora": {"arguments": jobs.new("flora", **WAYS["flora"])},
            "sketched": {"arguments": jobs.new("sketched", **WAYS["sketched"])},
            "fsdp": {"arguments": jobs.new("fsdp", "--fsdp", **WAYS["flora"])},
            "fsdp-sketched": {"arguments": jobs.new("fsdp-sketched", "--fsdp", **WAYS["sketched"])},
            "half": {"arguments": jobs.new("half", **WAYS["flora"]), **HALFWAY},
            "fsdp-half": {"arguments": jobs.new("fsdp-half", "--fsdp", **WAYS["flora"]), **HALFWAY},
            "one-half-fsdp resumed": {"arguments": jobs.resume("one-half-fsdp", "--fsdp")},
            "dropout-half": {"arguments": jobs.new("dropout-half", model=dropout, **GPT2), **HALFWAY},
            "dropout-half resumed": {"arguments": jobs.resume("dropout-half")},
            "dropout": {"arguments": jobs.new("dropout", model=dropout, **GPT2)},
            "odd": {"arguments": jobs.new("odd", batch_size=3)},
            "jax": {"arguments": jobs.new("jax", backend="jax")},
            "compare": {"arguments": ["compare", "--steps", "2"]},
            "killed": {"arguments": jobs.new("killed", **{**WAYS["flora"], "save_every": 2}), "die": 4},
        },
    )


@pytest.fixture(scope="module")
def more(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """What two processes do in the slow tests."""
    jobs = Jobs(texts, tmp_path_factory.mktemp("more"))
    jobs.stopped("one-half")
    tied = write_gpt2(jobs.folder / "tied-model", texts, dropout=0.0)
    exact = ("--fsdp", "--gradient-checkpointing")
    return session(
        jobs.folder,
        2,
        {
            "adamw": {"arguments": jobs.new("adamw", **WAYS["adamw"])},
            "exact": {"arguments": jobs.new("exact", **WAYS["exact"])},
            "fsdp-exact": {"arguments": jobs.new("fsdp-exact", *exact, **WAYS["exact"])},
            "fsdp-adamw": {"arguments": jobs.new("fsdp-adamw", "--fsdp", **WAYS["adamw"]), **HALFWAY},
            "fsdp-adamw resumed": {"arguments": jobs.resume("fsdp-adamw")},
            "fsdp-tied": {"arguments": jobs.new("fsdp-tied", "--fsdp", model=tied, **GPT2, **WAYS["flora"])},
            "one-half resumed": {"arguments": jobs.resume("one-half")},
        },
    )


def assert_trains_as_one(one: Alone, several: Session, name: str) -> None:
    assert several.codes[name] == 0, several.errors
    assert_close(several.run(name), one[name], TOLERANCES.get(name, TOLERANCE))
    assert {path.name for path in newest(one[name]).iterdir()} - {"rng_state.pth"} == {
        path.name for path in newest(several.run(name)).iterdir()
    } - {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.parametrize("name", ["flora", "sketched"])
def test_two_processes_train_what_one_does(one: Alone, two: Session, name: str) -> None:
    assert_trains_as_one(one, two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "exact"])
def test_two_processes_train_what_one_does_in_other_ways(one: Alone, more: Session, name: str) -> None:
    assert_trains_as_one(one, more, name)


@pytest.mark.parametrize("name", ["flora", "sketched"])
def test_shards_train_what_whole_tensors_do(one: Alone, two: Session, name: str) -> None:
    assert_shards_train_as_one(one, two.run("fsdp" if name == "flora" else f"fsdp-{name}"), name)


@pytest.mark.slow
def test_shards_accumulate_exactly_as_whole_tensors_do(one: Alone, more: Session) -> None:
    assert_shards_train_as_one(one, more.run("fsdp-exact"), "exact")


def assert_shards_train_as_one(one: Alone, sharded: RunFolder, name: str) -> None:
    assert_close(sharded, one[name])
    for tensor, other in zip(saved_state(sharded), saved_state(one[name]), strict=True):
        assert (tensor - other).abs().max() <= TOLERANCE * other.abs().max()
    summary, whole = sharded.summary(), one[name].summary()
    assert summary is not None
    assert whole is not None
    assert (summary["processes"], summary["fsdp"], whole["processes"], whole["fsdp"]) == (2, True, 1, False)
    assert summary["gradient_bytes"] == whole["gradient_bytes"] / 2
    # Half of the rows, and what belongs to all rows, in both.
    assert 0.5 < summary["optimizer_state_bytes"] / whole["optimizer_state_bytes"] < 0.6


@pytest.mark.slow
def test_shards_of_adamw_stop_and_go_on(one: Alone, more: Session) -> None:
    assert (more.codes["fsdp-adamw"], more.codes["fsdp-adamw resumed"]) == (130, 0)
    assert_close(more.run("fsdp-adamw"), one["adamw"], TOLERANCES["adamw"])


@pytest.mark.slow
def test_tied_embeddings_are_sharded_once(texts: Path, more: Session, tmp_path: Path) -> None:
    model = more.folder / "tied-model"
    config = {name: value for name, value in JOB.items() if name != "vocab_size"}
    whole = run(fast_config(texts, **config, **WAYS["flora"], model=str(model), rank=8, lr=1e-3), tmp_path / "whole")
    assert_close_losses(more.run("fsdp-tied"), whole)
    weights, others = (load_file(newest(each) / "model.safetensors") for each in (more.run("fsdp-tied"), whole))
    # Not all weights: attention does not feel the bias of its keys, and trains it on the rounding alone.
    assert weights.keys() == others.keys()
    loaded = AutoModelForCausalLM.from_pretrained(newest(more.run("fsdp-tied")))
    assert type(loaded).__name__ == "GPT2LMHeadModel"
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_one_process_speaks_for_all(two: Session) -> None:
    for name in ("flora", "fsdp"):
        assert two.output.count(f"run folder: {two.folder / name}\n") == 1
        assert two.output.count(f"everything is in {two.folder / name}\n") == 1
    for name in ("flora", "fsdp", "dropout"):
        assert two.said(name) == ""
    assert "2, with all of the model each; sizes are one's" in two.output
    assert "2, with a part of the model each; sizes are one's" in two.output
    again = "floragrad: stopped and saved; continue with: torchrun --nproc-per-node 2 -m floragrad train --resume"
    for name in ("half", "dropout-half"):
        assert two.said(name).splitlines() == [f"{again} {two.folder / name}"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "odd",
            "--batch-size 3 cannot be divided over 2 processes: give a multiple of 2 to a new run, or start 1, 3 of",
        ),
        ("jax", "this is one of 2 processes, and only floragrad train takes several, with --backend torch"),
        ("compare", "this is one of 2 processes, and only floragrad train takes several"),
    ],
)
def test_what_cannot_be_done_is_said_once(two: Session, name: str, message: str) -> None:
    assert two.codes[name] == 2
    (said,) = two.said(name).splitlines()
    assert said.startswith(f"floragrad: {message}")
    assert not (two.folder / name).exists()


def test_the_processes_stop_in_the_same_step(two: Session) -> None:
    for name in ("half", "fsdp-half", "dropout-half"):
        assert two.codes[name] == 130
    for name in ("half", "fsdp-half"):
        assert [step for step, _ in two.run(name).checkpoints()] == [HALF]
        assert two.run(name).metrics()[-1]["step"] == HALF


def test_as_many_go_on_bit_for_bit(two: Session) -> None:
    """Each with its own random numbers: the model has dropout, and no two processes have the same."""
    assert_same_run(two.run("dropout-half"), two.run("dropout"))
    one, other = (
        torch.load(newest(two.run("dropout")) / f"rng_state_{rank}.pth", weights_only=False) for rank in (0, 1)
    )
    assert not torch.equal(one["cpu"], other["cpu"])


def test_two_go_on_with_shards_where_one_stopped(one: Alone, two: Session) -> None:
    assert two.codes["one-half-fsdp resumed"] == 0
    assert_close(two.run("one-half-fsdp"), one["flora"])


@pytest.mark.slow
def test_two_go_on_where_one_stopped(one: Alone, more: Session) -> None:
    assert more.codes["one-half resumed"] == 0
    assert_close(more.run("one-half"), one["flora"])


@pytest.mark.parametrize("name", ["half", "fsdp-half"])
def test_one_goes_on_where_two_stopped(one: Alone, two: Session, tmp_path: Path, name: str) -> None:
    shutil.copytree(two.folder / name, tmp_path / name)
    assert command("train", "--resume", tmp_path / name) == 0
    assert_close(RunFolder.open(tmp_path / name), one["flora"])


@pytest.mark.slow
def test_four_go_on_where_two_stopped(one: Alone, two: Session, tmp_path: Path) -> None:
    """In the other way: each of the two is written once and read once."""
    ways = {"half": ("--fsdp",), "fsdp-half": ("--no-fsdp",)}
    jobs = {}
    for name, flags in ways.items():
        shutil.copytree(two.folder / name, tmp_path / name)
        jobs[name] = {"arguments": ["train", "--resume", str(tmp_path / name), *flags]}
    four = session(tmp_path, 4, jobs)
    assert four.codes == dict.fromkeys(ways, 0), four.errors
    assert four.returncode == 0
    for name in ways:
        assert_close(four.run(name), one["flora"])
        summary = four.run(name).summary()
        assert summary is not None
        assert (summary["processes"], summary["fsdp"]) == (4, name == "half")


def test_a_checkpoint_is_whole_or_not_there(one: Alone, two: Session, tmp_path: Path) -> None:
    """The first process was killed while it wrote the second checkpoint; one process goes on from the first."""
    assert two.returncode != 0
    assert "killed" not in two.codes
    killed = RunFolder.open(Path(shutil.copytree(two.folder / "killed", tmp_path / "killed")))
    assert [step for step, _ in killed.checkpoints()] == [2]
    assert (killed.staging / "checkpoint-4" / "optimizer.pt").is_file()
    assert killed.metrics()[-1]["step"] == 4
    assert command("train", "--resume", killed.path) == 0
    assert_close(killed, one["flora"])
    assert not killed.staging.exists()


def test_who_is_left_says_so(two: Session) -> None:
    assert (
        "floragrad: process 1 of 2 stops, for another one died or did not answer for --timeout 600 seconds: see what "
        "that one said; continue with: torchrun --nproc-per-node 2 -m floragrad train --resume "
        f"{two.folder / 'killed'}\n"
    ) in two.said("killed")


@pytest.mark.slow
def test_one_dies_and_none_waits(texts: Path, tmp_path: Path) -> None:
    """Killed from outside, in the middle of a step; the test above kills the first process instead."""
    process = start(2, str(TORCHRUN.with_name("floragrad")), *job(tmp_path / "run", texts, steps=400))
    wait_for_step(process, tmp_path / "run")
    workers = psutil.Process(process.pid).children()
    next(each for each in workers if each.environ()["RANK"] == "1").kill()
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "floragrad: process 0 of 2 stops, for another one died" in errors
    assert not any(each.is_running() for each in workers)


@pytest.mark.slow
def test_ctrl_c_reaches_all(texts: Path, tmp_path: Path) -> None:
    """The command of the README, and a signal to torchrun."""
    process = start(2, "-m", "floragrad", *job(tmp_path / "run", texts, "--fsdp", steps=400))
    wait_for_step(process, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    folder = RunFolder.open(tmp_path / "run")
    assert errors.count("floragrad: stopped and saved; continue with: torchrun --nproc-per-node 2") == 1
    ((step, _),) = folder.checkpoints()
    assert 0 < step < 400
    assert folder.metrics()[-1]["step"] == step
    assert not folder.staging.exists()
