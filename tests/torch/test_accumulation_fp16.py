"""fp16 with a GradScaler: inf and NaN are found in the sketches, the window is skipped, the scaler backs off."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from floragrad import GradientAccumulator
from tests.torch.accumulation_cases import ENDINGS, MAX_NORM, SCENARIOS, STEPS, Ending, flat

PLAIN = SCENARIOS[0]
CLIPPING = [ending for ending in ENDINGS if ending.clips]


def fp16_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        return model(tokens)


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**10, "growth_interval": 2, **options})


@pytest.mark.parametrize("ending", CLIPPING, ids=str)
def test_equals_exact_accumulation_with_a_scaler(ending: Ending) -> None:
    """Clipped to the norm of the unscaled gradients; the scale grows as it does without us."""
    model, twin = PLAIN.model(), PLAIN.model()
    ours, theirs = scaler(), scaler()
    optimizer = ending.optimizers(list(model.parameters()))
    made = ending.optimizers(list(twin.parameters()))
    bare = made if isinstance(made, list) else [made]
    options = {**ending.options, "state_dtype": "float32", "scaler": ours}
    with GradientAccumulator(optimizer, STEPS, **options) as accumulator:
        for window in PLAIN.windows():
            for tokens in window:
                accumulator.backward(fp16_loss(model, tokens))
                theirs.scale(fp16_loss(twin, tokens) / STEPS).backward()
            for each in bare:
                theirs.unscale_(each)
            expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), MAX_NORM)
            norm = accumulator.clip_grad_norm_(MAX_NORM)
            # The division by four happens before fp16's rounding there, after it here.
            assert norm.item() == pytest.approx(expected.item(), rel=1e-3)
            assert accumulator.step()
            for each in bare:
                theirs.step(each)
                each.zero_grad()
            ours.update()
            theirs.update()
            assert ours.get_scale() == theirs.get_scale()
    assert ours.get_scale() > 2.0**10
    assert (flat(model) - flat(twin)).abs().max() < 1e-3 * flat(twin).abs().max()


@pytest.mark.parametrize("clips", [True, False], ids=["clipped", "not-clipped"])
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", [0, STEPS - 1], ids=["first", "last"])
@pytest.mark.parametrize("options", [{}, {"ratio": 2}, {"state_dtype": "int8"}, {"state_dtype": "float32"}], ids=str)
@pytest.mark.parametrize("ending", [CLIPPING[0], CLIPPING[2]], ids=str)
def test_a_window_that_is_not_finite_is_skipped(
    ending: Ending, options: dict, where: int, poison: float, clips: bool
) -> None:
    model, grad_scaler = PLAIN.model(), scaler()
    optimizer = ending.optimizers(list(model.parameters()))
    options = {**ending.options, **options, "scaler": grad_scaler}
    with GradientAccumulator(optimizer, STEPS, **options) as accumulator:
        before = flat(model)
        for number, tokens in enumerate(PLAIN.windows()[0]):
            loss = model(tokens)
            if number == where:
                # One number of one tensor, as an overflow makes it.
                loss = loss + (model.up.weight[0, 0] - model.up.weight[0, 0].detach()) * poison
            accumulator.backward(loss)
        if clips:
            assert not accumulator.clip_grad_norm_(MAX_NORM).isfinite()
        assert accumulator.step() is False
        grad_scaler.update()
        assert grad_scaler.get_scale() == 2.0**9
        assert torch.equal(flat(model), before)
        for tokens in PLAIN.windows()[1]:
            accumulator.backward(model(tokens))
        assert accumulator.step() is True
        grad_scaler.update()
    assert not torch.equal(flat(model), before)
    assert flat(model).isfinite().all()


def test_one_step_with_a_scaler_is_sketched() -> None:
    """Before any tensor may be updated all gradients must be known to be finite."""
    model, grad_scaler = PLAIN.model(), scaler()
    optimizer = CLIPPING[0].optimizers(list(model.parameters()))
    with GradientAccumulator(optimizer, 1, scaler=grad_scaler) as accumulator:
        assert accumulator.report().state_bytes > 0
        before = flat(model)
        accumulator.backward(model(PLAIN.windows()[0][0]) * float("inf"))
        assert accumulator.step() is False
        assert torch.equal(flat(model), before)


def test_a_scaler_that_is_not_enabled_changes_nothing() -> None:
    results = []
    for given in (None, torch.amp.GradScaler("cpu", enabled=False)):
        model = PLAIN.model()
        with GradientAccumulator(CLIPPING[0].optimizers(list(model.parameters())), STEPS, scaler=given) as accumulator:
            for tokens in PLAIN.windows()[0]:
                accumulator.backward(model(tokens))
            accumulator.step()
        results.append(flat(model))
    assert torch.equal(*results)


def test_without_a_scaler_nan_reaches_the_parameters() -> None:
    """As in torch.optim: nothing is skipped in silence."""
    model = PLAIN.model()
    with GradientAccumulator(CLIPPING[0].optimizers(list(model.parameters())), STEPS) as accumulator:
        for tokens in PLAIN.windows()[0]:
            accumulator.backward(model(tokens) * float("nan"))
        assert accumulator.clip_grad_norm_(1.0).isnan()
        assert accumulator.step() is True
    assert flat(model).isnan().any()


@pytest.mark.parametrize("projection", ["sign", "gaussian"])
def test_autocast_around_the_backward_changes_nothing(projection: Any) -> None:
    """Folding and decoding are float32 wherever the backward pass is run."""
    results, grads = [], torch.randn(STEPS, 40, 48, generator=torch.Generator().manual_seed(0))
    for enabled in (False, True):
        param = nn.Parameter(torch.zeros(40, 48))
        optimizer = torch.optim.SGD([param], lr=1.0)
        with (
            GradientAccumulator(optimizer, STEPS, ratio=2, projection=projection) as accumulator,
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled),
        ):
            for grad in grads:
                accumulator.backward((param * grad).sum())
            accumulator.clip_grad_norm_(MAX_NORM)
            accumulator.step()
        results.append(param.detach())
    assert torch.equal(*results)
