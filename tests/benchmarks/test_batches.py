"""Workers that live at the same time fit into memory, and the reference is among them."""

from benchmarks.step.batches import Subject, batches, needed_bytes
from benchmarks.step.optimizers import ENTRIES, FUSED, INT8
from benchmarks.step.shapes import LAYERS


def test_all_that_fits_is_one_batch() -> None:
    assert batches({"reference": 3, "a": 2, "b": 5}, "reference", 10) == ([["reference", "a", "b"]], [])


def test_every_batch_has_the_reference_and_fits() -> None:
    needed = {"reference": 3, **{f"worker {number}": 1 + number % 5 for number in range(20)}}
    found, without = batches(needed, "reference", 12)
    assert not without
    assert len(found) > 1
    assert sorted(name for batch in found for name in batch[1:]) == sorted(set(needed) - {"reference"})
    for batch in found:
        assert batch[0] == "reference"
        assert sum(needed[name] for name in batch) <= 12


def test_what_does_not_fit_is_told_apart() -> None:
    assert batches({"reference": 3, "large": 8, "small": 2}, "reference", 10) == ([["reference", "small"]], ["large"])
    assert batches({"reference": 3, "large": 8}, "reference", 10) == ([["reference"]], ["large"])
    assert batches({"reference": 11, "small": 2}, "reference", 10) == ([], ["reference", "small"])


def test_needs_are_above_what_the_tensors_take() -> None:
    weights = 4 * 85_054_464
    assert needed_bytes(Subject(FUSED, LAYERS), "float32") > 4 * weights, "weights, gradients, two moments"
    assert needed_bytes(Subject(FUSED, LAYERS), "bfloat16") < needed_bytes(Subject(FUSED, LAYERS), "float32")
    assert needed_bytes(Subject(INT8, "gpt2"), "float32") > needed_bytes(Subject(INT8, LAYERS), "float32")
    assert all(needed_bytes(Subject(name, LAYERS), "float32") > 2 * weights for name in ENTRIES)
