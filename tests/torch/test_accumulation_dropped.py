"""A dropped micro-batch leaves nothing; gradients changed in vain are noticed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from floragrad import Flora, GradientAccumulator
from tests.torch.accumulation_cases import ENDINGS, MAX_NORM, STEPS, Ending, Net, flat, flora

CLIPPING = [ending for ending in ENDINGS if ending.clips]
POISON = float("nan")


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(0, 200, (count, 2, 7), generator=generator))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net()


def made(ending: Ending, model: nn.Module, **options: Any) -> GradientAccumulator:
    return GradientAccumulator(ending.optimizers(list(model.parameters())), STEPS, **{**ending.options, **options})


def poisoned(model: nn.Module, tokens: Tensor) -> Tensor:
    """A finite loss whose gradient is NaN in the first layers only, after the last ones have been folded."""
    hidden = model.embed(tokens)
    hidden = hidden + model.conv(hidden.transpose(1, 2)).transpose(1, 2)
    hidden.register_hook(lambda grad: grad * POISON)
    logits = model.head(model.block(hidden))
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize("ending", CLIPPING, ids=str)
@pytest.mark.parametrize("dropped", [(0,), (1, 2), (STEPS - 1,)], ids=str)
def test_what_is_not_finite_is_dropped_bit_for_bit(ending: Ending, dropped: tuple[int, ...]) -> None:
    """The window equals one that never had it, rounding and projections too."""
    results = []
    for bad in (True, False):
        model = net()
        with made(ending, model, ratio=2, drop_nonfinite=True) as accumulator:
            for _ in range(2):
                for number, tokens in enumerate(batches(STEPS)):
                    last = number == STEPS - 1
                    if number not in dropped:
                        with accumulator.micro_batch(last=last):
                            accumulator.backward(model(tokens))
                    elif bad:
                        with accumulator.micro_batch(last=last):
                            accumulator.backward(poisoned(model, tokens))
                assert accumulator.flush()
                accumulator.clip_grad_norm_(MAX_NORM)
                accumulator.step()
            assert accumulator.dropped == (2 * len(dropped) if bad else 0)
        results.append(flat(model))
    assert results[0].isfinite().all()
    # A materialised window keeps its last gradient whole, which is another one where the last was dropped.
    folds_all = ending.name.startswith("release") or STEPS - 1 not in dropped
    if folds_all:
        assert torch.equal(*results)
    else:
        assert (results[0] - results[1]).abs().max() < 0.1 * (results[1] - flat(net())).abs().max()


@pytest.mark.parametrize("ending", ENDINGS, ids=str)
@pytest.mark.parametrize("weights", [None, (0.1, 0.4, 0.2, 0.3)], ids=["mean", "sum"])
def test_dropped_before_the_backward_pass_with_any_ending(ending: Ending, weights: tuple[float, ...] | None) -> None:
    results = []
    for drop in (True, False):
        model = net()
        with made(ending, model, state_dtype="float32") as accumulator:
            for number, tokens in enumerate(batches(STEPS)):
                if number == 1 and not drop:
                    continue
                with accumulator.micro_batch(weight=weights and weights[number], last=number == STEPS - 1):
                    loss = model(tokens)
                    if number == 1:
                        accumulator.drop_micro_batch()
                    else:
                        accumulator.backward(loss)
            assert accumulator.complete
            if ending.clips:
                accumulator.clip_grad_norm_(MAX_NORM)
            accumulator.step()
        results.append(flat(model))
    if "in-backward" in ending.name:
        # There the mean's factor is known late: the window that was one micro-batch short divides by as many.
        assert torch.allclose(*results, rtol=1e-6, atol=1e-8)
    else:
        assert torch.equal(*results)


def test_a_pass_that_broke_off_is_taken_back() -> None:
    """As one that ran out of memory."""
    results = []
    for breaks in (True, False):
        model = net()
        with made(ENDINGS[0], model, drop_nonfinite=True) as accumulator:
            for number, tokens in enumerate(batches(STEPS)):
                if number == 2 and breaks:
                    handle = model.embed.weight.register_hook(lambda grad: 1 / 0)
                    with pytest.raises(ZeroDivisionError):
                        accumulator.backward(model(tokens))
                    handle.remove()
                    accumulator.drop_micro_batch()
                elif number != 2:
                    accumulator.backward(model(tokens))
            assert accumulator.flush()
            accumulator.step()
        results.append(flat(model))
    assert torch.equal(*results)


def test_a_window_all_of_whose_micro_batches_are_dropped_is_none() -> None:
    model = net()
    with made(ENDINGS[0], model, drop_nonfinite=True) as accumulator:
        for tokens in batches(STEPS):
            accumulator.backward(poisoned(model, tokens))
        assert not accumulator.complete
        assert not accumulator.flush()
        assert torch.equal(flat(model), flat(net()))
        for tokens in batches(STEPS):
            accumulator.backward(model(tokens))
        assert accumulator.complete
        accumulator.step()
    assert not torch.equal(flat(model), flat(net()))


def test_dropped_micro_batches_are_saved_with_the_window() -> None:
    """A window that is resumed gives the mean of as many."""
    results = []
    for resumes in (True, False):
        model = net()
        accumulator = made(ENDINGS[0], model, drop_nonfinite=True)
        for number, tokens in enumerate(batches(STEPS)):
            accumulator.backward(poisoned(model, tokens) if number == 0 else model(tokens))
            if number == 1 and resumes:
                saved = accumulator.state_dict()
                accumulator.zero_grad()
                accumulator.close()
                accumulator = made(ENDINGS[0], model, drop_nonfinite=True)
                accumulator.load_state_dict(saved)
        accumulator.step()
        accumulator.close()
        results.append(flat(model))
    assert torch.equal(*results)


def test_too_late_to_drop() -> None:
    for ending, count in ((ENDINGS[0], 11), (ENDINGS[1], 11)):
        model = net()
        accumulator = made(ending, model)
        accumulator.begin_micro_batch(last="in-backward" in ending.name)
        model(batches(1)[0]).backward()
        with pytest.raises(RuntimeError, match=r"\d+ gradients .* drop_nonfinite=True \(a second copy") as caught:
            accumulator.drop_micro_batch()
        assert int(str(caught.value).split()[0]) <= count
        accumulator.zero_grad()
        with pytest.raises(RuntimeError, match="outside a micro-batch"):
            accumulator.drop_micro_batch()
        accumulator.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": False}, "drop_nonfinite=True with clip=False"),
        ({"scaler": torch.amp.GradScaler("cpu")}, "drop_nonfinite=True with a scaler"),
    ],
    ids=["clip", "scaler"],
)
def test_options_that_contradict_dropping(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(ENDINGS[0], net(), drop_nonfinite=True, **options)


def test_the_report_counts_the_second_copy() -> None:
    model = net()
    with made(ENDINGS[0], model, drop_nonfinite=True) as accumulator:
        for tokens in batches(2):
            accumulator.backward(model(tokens))
        snapshots = [value for entry in accumulator._entries for value in entry.sketch._snapshot.values()]
        kept = [value for entry in accumulator._entries for value in entry.sketch.buffers.values()]
        assert accumulator.report().state_bytes == sum(each.nbytes for each in snapshots + kept)
        accumulator.zero_grad()
    with made(ENDINGS[0], net()) as without:
        assert not any(entry.sketch._snapshot for entry in without._entries)


HABITS = {
    "clip_grad_norm_": lambda params: torch.nn.utils.clip_grad_norm_(params, 1.0),
    "clip_grad_value_": lambda params: torch.nn.utils.clip_grad_value_(params, 1.0),
    "in-place": lambda params: [param.grad.nan_to_num_() for param in params if param.grad is not None],
}


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("options", [{}, {"clip": False}], ids=["clip", "in-backward"])
def test_gradients_changed_by_habit_are_noticed_once(
    habit: str, options: dict, recwarn: pytest.WarningsRecorder
) -> None:
    model = net()
    with GradientAccumulator(flora(model.parameters()), 2, **options) as accumulator:
        for tokens in batches(4):
            accumulator.backward(model(tokens))
            if accumulator.complete:
                HABITS[habit](list(model.parameters()))
                accumulator.step()
                assert all(param.grad is None for param in model.parameters())
    assert [str(each.message).split("; ")[1] for each in recwarn] == [
        "call accumulator.clip_grad_norm_(max_norm), or construct the accumulator with release=False"
    ]
    assert recwarn[0].filename == __file__


def test_who_does_not_clip_or_clips_rightly_is_not_warned(recwarn: pytest.WarningsRecorder) -> None:
    for clip in (True, False):
        model = net()
        optimizer = flora(model.parameters())
        with GradientAccumulator(optimizer, 2) as accumulator:
            for tokens in batches(4):
                accumulator.backward(model(tokens))
                if accumulator.complete:
                    if clip:
                        accumulator.clip_grad_norm_(MAX_NORM)
                        assert all(param.grad is None for param in model.parameters())
                    accumulator.step()
                    optimizer.zero_grad()
    assert not recwarn.list


def test_clipping_by_habit_before_the_norm_is_asked_for_is_noticed() -> None:
    model = net()
    with GradientAccumulator(flora(model.parameters()), 2) as accumulator:
        for tokens in batches(2):
            accumulator.backward(model(tokens))
        HABITS["clip_grad_norm_"](list(model.parameters()))
        assert accumulator.grad_norm > 0
        with pytest.warns(UserWarning, match="gradients in .grad were changed"):
            accumulator.step()


def test_an_abandoned_window_leaves_no_zeros() -> None:
    for lost in (True, False):
        model = nn.Linear(32, 32)
        accumulator = GradientAccumulator(Flora(model.parameters(), lr=1e-3, rank=8), 1)
        accumulator.backward(model(torch.ones(2, 32)).sum())
        if lost:
            del accumulator
        else:
            accumulator.close()
        assert all(param.grad is None for param in model.parameters())
