"""Workers do what they are told, and say what went wrong."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import ClassVar

import pytest
import torch

from benchmarks.step import measure as measuring
from benchmarks.step.batches import Subject
from benchmarks.step.measure import WARM_UP, Settings, measure
from benchmarks.step.optimizers import ALL, FUSED, INT8, TORCH_ADAFACTOR
from benchmarks.step.processes import Worker, WorkerError, _without_places
from benchmarks.step.shapes import Spec
from benchmarks.step.worker import Job

PEERS = ("flora-opt", "galore-torch", "apollo-torch", "bitsandbytes", "torchao")
TENSORS = (Spec("embedding", (640, 64), "vocabulary"), Spec("weight", (64, 96), "matrix"), Spec("bias", (7,), "vector"))
NUMBERS = sum(spec.numel for spec in TENSORS)
REFERENCE = Subject(FUSED, "gpt2-layers-256")
FAILING = Subject(TORCH_ADAFACTOR, "gpt2-layers-256")
SLOW = Subject(INT8, "gpt2-layers-256")


@pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
@pytest.mark.parametrize(
    "name", [name for name, entry in ALL.items() if not entry.is_compiled and not name.startswith(PEERS)]
)
def test_a_job_of_each_row_that_needs_no_peer(name: str) -> None:
    before = torch.get_num_threads()
    try:
        job = Job(name, [(spec.name, list(spec.shape), spec.kind) for spec in TENSORS], "float32", 1)
        assert job.step()["seconds"] > 0
        held = job.examine()
    finally:
        torch.set_num_threads(before)
    assert 0 <= held["state_bytes"] <= 2 * 4 * NUMBERS + 4 * len(TENSORS)
    assert 0 <= held["peak_bytes"] <= 6 * 4 * TENSORS[0].numel


def test_processes() -> None:
    """One that works, and one that is asked for what there is not."""
    with ExitStack() as stack:
        good, bad = (stack.enter_context(Worker(FUSED, TENSORS, dtype, 1)) for dtype in ("bfloat16", "float99"))
        good.begin()
        bad.begin()
        good.ready()
        assert good.step() > 0
        assert good.examine() == (2 * 2 * NUMBERS + 4 * len(TENSORS), 0)
        with pytest.raises(WorkerError, match=r"AttributeError: .*float99"):
            bad.ready()
        good._process.kill()
        with pytest.raises(WorkerError, match="SIGKILL"):
            good.step()


def test_errors_do_not_tell_where_this_machine_keeps_things() -> None:
    text = f"ImportError: {sys.prefix}/lib/libmissing.so: no such file"
    assert _without_places(text) == "ImportError: …/lib/libmissing.so: no such file"


class FakeWorker:
    """Answers at once; the failing one fails in its third step."""

    log: ClassVar[list[str]] = []

    def __init__(self, entry: str, *_: object) -> None:
        self.entry, self.steps = entry, 0

    def begin(self) -> None: ...

    def ready(self) -> None: ...

    def dismiss(self) -> None: ...

    def step(self) -> float:
        self.steps += 1
        self.log.append(self.entry)
        if self.entry == FAILING.entry and self.steps == 3:
            raise WorkerError("ValueError: the third step")
        return 10.0 if self.entry == SLOW.entry else 0.1 * self.steps

    def examine(self) -> tuple[int, int]:
        return 100, 10

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(measuring, "Worker", FakeWorker)
    monkeypatch.setattr(measuring, "PAUSE", 0)
    FakeWorker.log.clear()
    return


@pytest.mark.usefixtures("_fake")
def test_the_others_go_on_when_one_fails() -> None:
    found = measure([FAILING], REFERENCE, Settings(1, "float32", 4), lambda _: None)
    assert found[FAILING].trouble == "ValueError: the third step"
    assert found[FAILING].seconds == []
    reference = found[REFERENCE]
    assert reference.first_seconds == 0.1
    assert reference.seconds == pytest.approx([0.1 * step for step in range(WARM_UP + 1, WARM_UP + 5)])
    assert reference.reference_seconds == reference.seconds
    assert (reference.state_bytes, reference.peak_bytes) == (100, 10)


@pytest.mark.usefixtures("_fake")
def test_a_slow_one_leaves_at_the_limit_and_keeps_its_figures() -> None:
    found = measure([SLOW], REFERENCE, Settings(1, "float32", 6, limit=55), lambda _: None)
    slow = found[SLOW]
    assert len(slow.seconds) == len(slow.reference_seconds) == 1 + 6 - WARM_UP
    assert slow.trouble == "left after 60 s of steps beside the first: --limit 55"
    assert slow.state_bytes == 100
    assert len(found[REFERENCE].seconds) == 6


@pytest.mark.usefixtures("_fake")
def test_every_one_steps_once_in_a_round() -> None:
    measure([SLOW], REFERENCE, Settings(1, "float32", 30), lambda _: None)
    rounds = list(zip(FakeWorker.log[::2], FakeWorker.log[1::2], strict=True))
    assert all(set(pair) == {FUSED, INT8} for pair in rounds)
    assert len(set(rounds)) == 2, "the order changes"


@pytest.mark.usefixtures("_fake")
def test_nothing_without_the_reference() -> None:
    with pytest.raises(RuntimeError, match="which all are compared with, has failed: ValueError: the third step"):
        measure([SLOW], FAILING, Settings(1, "float32", 4), lambda _: None)
