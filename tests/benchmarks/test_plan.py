"""What is measured: the goals' table first, everything once."""

import pytest

from benchmarks.step.batches import batches, needed_bytes
from benchmarks.step.goals import COMPARED
from benchmarks.step.optimizers import ENTRIES, FUSED, INT8
from benchmarks.step.plan import PARTS
from benchmarks.step.shapes import LAYERS, MODELS, WIDTHS, layers_of_width, parameters, specs
from tests.benchmarks.results import wanted


def test_the_goals_come_first() -> None:
    first, *others = wanted().runs()
    assert (first.part, first.shapes, first.settings.threads, first.settings.dtype) == ("tables", LAYERS, 2, "float32")
    assert {subject.entry for subject in first.subjects} == set(ENTRIES)
    assert first.settings.limit is None
    tables = [run for run in others if run.part == "tables"]
    assert all(run.settings.limit == 60 for run in tables)
    assert len(tables) == 2 * 2 * 2 - 1
    assert {run.part for run in others} == set(PARTS)


def test_what_the_goals_compare_is_of_the_same_rounds() -> None:
    """In a machine with as much memory as two cores usually have."""
    first = next(iter(wanted().runs()))
    needed = {subject: needed_bytes(subject, "float32") for subject in (first.reference, *first.subjects)}
    (batch, *_), _ = batches(needed, first.reference, 16_000_000_000)
    assert set(COMPARED) <= {subject.entry for subject in batch}


def test_nothing_is_measured_twice() -> None:
    runs = wanted().runs()
    assert len(runs) == len({(run.part, run.shapes, run.settings) for run in runs})
    for run in runs:
        assert len(run.subjects) == len(set(run.subjects))


def test_epochs_are_five() -> None:
    (epochs,) = wanted(parts=["epochs"], rounds=10).runs()
    assert epochs.settings.rounds == 20


def test_only_some_optimizers() -> None:
    for run in wanted(only=["int8", "copy"]).runs():
        assert all("int8" in subject.entry or "copy" in subject.entry for subject in run.subjects)
        assert run.reference.entry == FUSED
    assert wanted(only=["no such optimizer"]).runs() == []


@pytest.mark.parametrize(
    ("name", "millions"), [("gpt2", 124.44), (LAYERS, 85.05), ("llama-60m", 58.07), ("t5-small", 60.51)]
)
def test_shapes_are_the_models(name: str, millions: float) -> None:
    """As the models' own papers and cards count them, tied tensors once."""
    assert parameters(name) / 1e6 == pytest.approx(millions, abs=0.01)


def test_layers_have_no_vocabulary_and_models_do() -> None:
    for width in WIDTHS:
        assert {spec.kind for spec in specs(layers_of_width(width))} == {"matrix", "vector"}
    for name in MODELS:
        assert {spec.kind for spec in specs(name)} == {"matrix", "vocabulary", "vector"}
    assert INT8 in ENTRIES
