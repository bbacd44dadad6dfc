"""A window interrupted anywhere and finished in a new process is the uninterrupted one, bit for bit."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from floragrad import GradientAccumulator
from tests.torch.accumulation_resume import RUNS, STEPS, STOPS, WINDOWS, Run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every checkpoint, and the parameters that another process reached from it."""
    folder = tmp_path_factory.mktemp("resume")
    for name, options in RUNS.items():
        for stop in STOPS:
            run = Run(**options)
            run.go(0, stop)
            torch.save(run.state(), folder / f"{name}-{stop}.pt")
            run.accumulator._remove()
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", "tests.torch.accumulation_resume", str(folder)], cwd=root, check=True)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_finished_in_a_new_process(name: str, finished: Path) -> None:
    run = Run(**RUNS[name])
    run.go(0, WINDOWS * STEPS)
    for stop in STOPS:
        assert torch.equal(torch.load(finished / f"{name}-{stop}.result"), run.result()), f"after {stop}"


def test_a_run_that_forgets_the_window_differs() -> None:
    """The test above can fail: what was folded before the interruption counts."""
    run, forgetful = Run(torch.float32), Run(torch.float32)
    for each in (run, forgetful):
        each.go(0, STEPS + 2)
    state = forgetful.accumulator.state_dict()
    forgetful.accumulator.load_state_dict({**state, "sketches": {}})
    for each in (run, forgetful):
        each.go(STEPS + 2, WINDOWS * STEPS)
    assert not torch.equal(run.result(), forgetful.result())


def test_complete_window_is_saved_before_its_step() -> None:
    run, resumed = Run(torch.float32), Run(torch.float32)
    for number in range(STEPS):
        run.accumulator.backward(run.model(torch.full((2, 7), number)))
    resumed.load(run.state())
    assert resumed.accumulator.complete
    for each in (run, resumed):
        each.accumulator.clip_grad_norm_(0.1)
        each.accumulator.step()
    assert torch.equal(run.result(), resumed.result())


def test_between_windows_no_gradient_is_saved() -> None:
    """The position, and of what is rounded in columns of one size those sizes."""
    run = Run(torch.float32)
    run.go(0, STEPS)
    state = run.accumulator.state_dict()
    assert {key for sketch in state["sketches"].values() for key in sketch} == {"folds", "col_var"}
    assert {sketch["folds"] for sketch in state["sketches"].values()} == {0}
    assert state["window"] == 1


def accumulator(shape: tuple[int, ...] = (64, 64), steps: int = 4, **options: object) -> GradientAccumulator:
    param = nn.Parameter(torch.ones(shape))
    return GradientAccumulator(torch.optim.SGD([param], lr=0.1), steps, **options)


def interrupted() -> dict:
    first = accumulator()
    param = next(iter(first._entries)).param
    first.backward(param.sum())
    return first.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 2}, "ratio=1, this accumulator has ratio=2"),
        ({"state_dtype": "int8"}, "state_dtype='int4'"),
        ({"seed": 1}, "seed=0"),
        ({"steps": 8}, "construct it with steps=4"),
        ({"projection": "gaussian"}, "projection='sign'"),
        ({"shape": (64, 128)}, "it belongs to another model"),
    ],
    ids=str,
)
def test_a_foreign_window_is_refused(options: dict, message: str) -> None:
    other = accumulator(**options)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(interrupted())
    assert other.state_dict()["seen"] == 0


def test_int4_windows_of_version_0_1_are_read_as_they_were_packed() -> None:
    """Byte j held columns j and ceil(k/2) + j, and no packing was named."""
    saved = copy.deepcopy(interrupted())
    (index, sketch), *_ = saved["sketches"].items()
    expected = sketch["data"]
    integers = torch.stack([expected & 15, expected >> 4], dim=-1).flatten(-2)
    sketch["data"] = integers[..., : expected.shape[-1]] | (integers[..., expected.shape[-1] :] << 4)
    del saved["int4_packing"]
    resumed = accumulator()
    resumed.load_state_dict(saved)
    found = {entry.tensor_id: entry.sketch.buffers["data"] for entry in resumed._entries if entry.sketch}
    assert expected.any()
    assert torch.equal(found[index], expected)


def test_gaussian_windows_belong_to_a_kind_of_device() -> None:
    first, second = (accumulator(ratio=2, projection="gaussian") for _ in range(2))
    first.backward(next(iter(first._entries)).param.sum())
    state = first.state_dict()
    second.load_state_dict(state)
    state["settings"]["device_type"] = "cuda"
    with pytest.raises(ValueError, match="device_type='cuda'"):
        second.load_state_dict(state)


def test_other_settings_between_windows_are_fine() -> None:
    first, second = accumulator(steps=1), accumulator(steps=8, ratio=2)
    second.load_state_dict(first.state_dict())
    assert not second.complete


@pytest.mark.parametrize("options", [{"steps": 1}, {"state_dtype": "float32"}, {"ratio": 2}], ids=str)
def test_sizes_of_columns_stand_in_nobodys_way(options: dict) -> None:
    """They are saved between windows too, and left alone where nothing is rounded by them."""
    first, other = accumulator(), accumulator(**options)
    param = next(iter(first._entries)).param
    for _ in range(first.steps):
        first.backward(param.square().sum())
    first.step()
    state = first.state_dict()
    assert (state["seen"], state["sketches"][0]["folds"]) == (0, 0)
    assert state["sketches"][0]["col_var"].all()
    other.load_state_dict(state)
    assert other.state_dict()["window"] == 1
