"""The Triton kernels that fold gradients into an accumulator's sketch and decode it, in the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from floragrad.policy import plan_accumulator
from floragrad.torch.accumulation.sketch import GradientSketch
from tests.marks import paired
from tests.torch.conftest import use
from tests.torch.interpreter import accesses, launched, use_triton

SHAPE = (2, 6, 150)
STATE_DTYPES = ["float32", "bfloat16", "int8", "int4"]


def sketch_of(ratio: int, state_dtype: Any, shape: tuple[int, ...] = SHAPE) -> GradientSketch:
    plan = plan_accumulator(shape, ratio=ratio, state_dtype=state_dtype, kind="matrix")
    return GradientSketch(plan, "sign", 3, 1, torch.device("cpu"))


def windows(sketch: GradientSketch, grads: Tensor, orthogonal: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Two windows of two gradients, in the second of which columns have been measured."""
    decoded = grads[0].clone()
    for window in range(2):
        sketch.folds = 0
        for grad in grads[2 * window : 2 * window + 2]:
            sketch.add(grad, 0.5, window, measure_noise=True)
        decoded = grads[0].clone()
        sketch.decode_into(decoded, window, 0.5, torch.tensor(2.0), orthogonal=orthogonal)
    return sketch.buffers, decoded


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "ratio"), paired((torch.float32, torch.bfloat16), STATE_DTYPES, (1, 2, 3)), ids=str
)
def test_folds_equal_eager_ones(
    dtype: torch.dtype, state_dtype: str, ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Low-bit sketches are the same bytes, but for what a unit in a sum's last place tips over: see test_triton."""
    grads = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    made = []
    for prepare in (use_triton, lambda patch: use("eager", patch)):
        with monkeypatch.context() as patch:
            prepare(patch)
            made.append(windows(sketch_of(ratio, state_dtype), grads, orthogonal=ratio == 3))
    (ours, decoded), (eager, expected) = made
    if state_dtype != "float32":
        assert (ours["data"] != eager["data"]).sum() <= 2  # of 1,800 numbers at most
    for key in ours.keys() - {"data"}:
        torch.testing.assert_close(ours[key], eager[key], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(decoded, expected, rtol=2.0**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_tensor_without_matrices_is_summed_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch)
    plan = plan_accumulator((300,), ratio=4, state_dtype="int8")
    sketch = GradientSketch(plan, "sign", 3, 1, torch.device("cpu"))
    grads = torch.randn(2, 300)
    with launched(monkeypatch) as made:
        for grad in grads:
            sketch.add(grad, 0.5, 0, measure_noise=True)
        decoded = torch.empty(300)
        sketch.decode_into(decoded, 0, 0.0, 1.0)
    assert len(made) == 3
    torch.testing.assert_close(decoded, grads.mean(0))


@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize("state_dtype", ["float32", "int8", "int4"])
def test_a_gradient_takes_one_launch_and_one_read(
    state_dtype: str, ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gradient and sketch; a second launch, of one program, adds up the noise where it is measured."""
    use_triton(monkeypatch)
    sketch, grads = sketch_of(ratio, state_dtype), torch.randn(3, *SHAPE)
    for measures, grad in zip((True, False, True), grads, strict=True):
        folds, data = sketch.folds, sketch.buffers["data"]
        kept = {key: sketch.buffers[key] for key in ("data", "scale", "noise") if key in sketch.buffers}
        with launched(monkeypatch) as made, accesses({"grad": grad, **kept}, monkeypatch) as seen:
            sketch.add(grad, 0.5, 0, measure_noise=measures)
        assert len(made) == 1 + (measures and "noise" in kept)
        assert seen.read["grad"] == grad.nbytes
        assert seen.read["data"] == (data.nbytes if folds else 0)
        assert seen.written["data"] == data.nbytes
    with launched(monkeypatch) as made, accesses({"grad": grads[0], **kept}, monkeypatch) as seen:
        sketch.decode_into(grads[0], 0, 0.0, 1.0)
    assert len(made) == 1
    assert (seen.read["grad"], seen.read["data"]) == (0, data.nbytes)
    assert seen.written["grad"] == grads[0].nbytes


def test_another_window_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows count in 64 bits from the second on: two kinds of numbers, whatever they are."""
    from tests.torch.compiled import COUNTED, signature_of

    use_triton(monkeypatch)
    sketch, kinds = sketch_of(3, "int8"), set()
    for window in (1, 2, 16, 2**20):
        sketch.folds = 1
        with launched(monkeypatch) as made:
            sketch.add(torch.randn(SHAPE), 1 / window, window, measure_noise=False)
        kinds.add(str(signature_of(made[0])))
        assert set(COUNTED) <= made[0].arguments.keys()
    assert len(kinds) == 1
