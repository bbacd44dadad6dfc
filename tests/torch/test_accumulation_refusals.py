"""What cannot work is refused by name, with the way out; hooks are left as they were found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from floragrad import Flora, GradientAccumulator


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(32, 32)


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.ones(2, 32)).square().mean()


def flora(model: nn.Module) -> Flora:
    return Flora(model.parameters(), lr=1e-3, rank=8)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: must be an integer >= 1"),
        ({"steps": 2.0}, "steps=2.0"),
        ({"steps": True}, "steps=True"),
        ({"ratio": 0}, "ratio=0: must be an integer >= 1"),
        ({"ratio": None}, "ratio=None"),
        ({"ratio": 2, "rank": 8}, "rank=8 and ratio=2: give one of them"),
        ({"rank": -1}, "rank=-1"),
        ({"state_dtype": "int2"}, "state_dtype='int2': must be one of"),
        ({"projection": "adaptive"}, "use projection='sign'"),
        ({"projection": "dct"}, "projection='dct'"),
        ({"seed": -1}, "seed=-1"),
        ({"clip": False, "scaler": torch.amp.GradScaler("cpu")}, "clip=False with a scaler"),
        ({"clip": False, "release": False}, "clip=False without release"),
        ({"check_replicas_every": 0}, "check_replicas_every=0: must be an integer >= 1"),
    ],
    ids=lambda part: part if isinstance(part, str) else "-".join(part),
)
def test_wrong_options(options: dict, message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message):
        GradientAccumulator(flora(model), **{"steps": 2, **options})
    GradientAccumulator(flora(model), 2).close()


def test_release_needs_an_optimizer_that_can() -> None:
    with pytest.raises(ValueError, match=r"release=True with SGD: .* \(\[AdamW\(\[p\], lr=\.\.\.\)"):
        GradientAccumulator(sgd(net()), 2, release=True)


@pytest.mark.parametrize(
    ("given", "error"), [(3, TypeError), ([], ValueError), ([net()], TypeError), ("adam", TypeError)], ids=str
)
def test_not_an_optimizer(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="optimizer"):
        GradientAccumulator(given, 2)


def begun(model: nn.Module, micro_batches: int, **options: Any) -> GradientAccumulator:
    accumulator = GradientAccumulator(flora(model), 2, **options)
    for _ in range(micro_batches):
        accumulator.backward(loss_of(model))
    return accumulator


MISUSES: list[tuple[int, dict, Callable[[GradientAccumulator, nn.Module], Any], str]] = [
    (1, {}, lambda a, m: a.step(), "after 1 of 2 micro-batches"),
    (1, {}, lambda a, m: a.clip_grad_norm_(1.0), "after 1 of 2 micro-batches"),
    (1, {}, lambda a, m: a.grad_norm, "after 1 of 2 micro-batches"),
    (0, {}, lambda a, m: a.step(), "after 0 of 2 micro-batches"),
    (2, {}, lambda a, m: a.backward(loss_of(m)), r"step\(\) before the next micro-batch"),
    (2, {"clip": False}, lambda a, m: a.clip_grad_norm_(1.0), "clip=True"),
    (2, {"clip": False}, lambda a, m: a.state_dict(), r"save after step\(\)"),
    (2, {"release": False}, lambda a, m: a.state_dict(), r"save after step\(\)"),
    (2, {"release": False}, lambda a, m: a.backward(loss_of(m)), r"step\(\) before the next micro-batch"),
    (0, {}, lambda a, m: a.end_micro_batch(), r"without begin_micro_batch\(\)"),
    (0, {}, lambda a, m: loss_of(m).backward(), r"outside a micro-batch: call accumulator\.backward"),
]


@pytest.mark.parametrize(("micro_batches", "options", "call", "message"), MISUSES)
def test_calls_out_of_turn(micro_batches: int, options: dict, call: Callable, message: str) -> None:
    model = net()
    with pytest.raises(RuntimeError, match=message):
        call(begun(model, micro_batches, **options), model)


@pytest.mark.parametrize("call", ["step", "flush", "state_dict", "begin_micro_batch"])
def test_an_open_micro_batch_is_ended_first(call: str) -> None:
    model = net()
    accumulator = GradientAccumulator(flora(model), 2)
    accumulator.begin_micro_batch()
    with pytest.raises(RuntimeError, match="a micro-batch is open"):
        getattr(accumulator, call)()


def test_weights_for_all_micro_batches_or_for_none() -> None:
    model = net()
    accumulator = begun(model, 1)
    with pytest.raises(ValueError, match="for every micro-batch of a window, or for none"):
        accumulator.backward(loss_of(model), weight=0.5)
    with pytest.raises(ValueError, match="give it to micro_batch"), accumulator.micro_batch():
        accumulator.backward(loss_of(model), weight=0.5)


def test_one_step_has_no_sketch_for_a_longer_window() -> None:
    model = net()
    accumulator = GradientAccumulator(flora(model), 1)
    with pytest.raises(ValueError, match="last=False with steps=1"):
        accumulator.begin_micro_batch(last=False)


def test_stale_gradients() -> None:
    model = net()
    accumulator = GradientAccumulator(flora(model), 2)
    model.weight.grad = torch.ones(32, 32)
    with pytest.raises(RuntimeError, match="has a gradient from before this window"):
        accumulator.backward(loss_of(model))
    model.zero_grad()
    accumulator.backward(loss_of(model))


def test_sparse_gradients() -> None:
    model = nn.Embedding(200, 32, sparse=True)
    accumulator = GradientAccumulator(torch.optim.SGD(model.parameters(), lr=0.1), 2)
    with pytest.raises(RuntimeError, match="give sparse=False"):
        accumulator.backward(model(torch.arange(3)).sum())


def interrupt(accumulator: GradientAccumulator, model: nn.Module) -> None:
    with accumulator.micro_batch():
        loss_of(model).backward()
        raise KeyboardInterrupt


def test_a_broken_backward_spoils_the_window_until_it_is_dropped() -> None:
    model = net()
    accumulator = begun(model, 1)
    with pytest.raises(KeyboardInterrupt):
        interrupt(accumulator, model)
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) drops the window"):
        accumulator.backward(loss_of(model))
    accumulator.zero_grad()
    for _ in range(2):
        accumulator.backward(loss_of(model))
    expected = torch.autograd.grad(loss_of(model), list(model.parameters()))
    norm = sum(grad.square().sum() for grad in expected).sqrt()
    assert accumulator.grad_norm.item() == pytest.approx(norm.item(), rel=0.1)


def test_zero_grad_drops_the_window_and_is_harmless_between_windows() -> None:
    model = net()
    accumulator = begun(model, 1)
    accumulator.zero_grad()
    dropped, fresh = accumulator.state_dict(), begun(net(), 0).state_dict()
    assert dropped.keys() == fresh.keys()
    assert {key for key in fresh if str(dropped[key]) != str(fresh[key])} == {"window"}, "as if it had not begun"
    number = accumulator.state_dict()["window"]
    accumulator.zero_grad()
    assert accumulator.state_dict()["window"] == number


def test_flush_of_nothing() -> None:
    assert begun(net(), 0).flush() is False
    model = net()
    accumulator = begun(model, 2, release=False)
    assert accumulator.flush()
    model.zero_grad()
    assert accumulator.flush() is False, "a materialised window that was used and freed is over"


def test_a_gradient_that_comes_back_after_it_was_folded() -> None:
    model = net()
    accumulator = begun(model, 1)
    accumulator.begin_micro_batch()
    loss_of(model).backward()
    model.weight.grad = torch.zeros(32, 32)
    with pytest.raises(RuntimeError, match="has a gradient again after it was folded"):
        accumulator.end_micro_batch()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) drops the window"):
        accumulator.backward(loss_of(model))


def test_registering_twice() -> None:
    model = net()
    first = GradientAccumulator(flora(model), 2)
    with pytest.raises(RuntimeError, match=r"has a GradientAccumulator already: close\(\) that one"):
        GradientAccumulator(sgd(model), 2)
    first.close()
    GradientAccumulator(sgd(model), 2).close()


def hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    found: list[Any] = [list((p._post_accumulate_grad_hooks or {}).values()) for p in model.parameters()]
    return [*found, list(optimizer._optimizer_step_pre_hooks.values())]


@pytest.mark.parametrize("make", [flora, sgd])
def test_close_leaves_the_model_as_it_was_found(make: Callable) -> None:
    """Foreign hooks see every gradient whole, and stay."""
    model, seen = net(), []
    optimizer = make(model)
    model.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    model.weight.register_hook(lambda grad: grad * 2)
    optimizer.register_step_pre_hook(lambda *_: None)
    before = hooks(model, optimizer)
    accumulator = GradientAccumulator(optimizer, 2)
    for _ in range(2):
        accumulator.backward(loss_of(model))
    accumulator.step()
    accumulator.close()
    accumulator.close()
    assert hooks(model, optimizer) == before
    assert len(seen) == 2
    loss_of(model).backward()
    assert len(seen) == 3
    assert model.weight.grad is not None
    with pytest.raises(RuntimeError, match="closed"):
        accumulator.backward(loss_of(model))


def test_close_says_what_it_drops() -> None:
    with pytest.warns(UserWarning, match=r"drops a window of 1 micro-batches: flush\(\) and step\(\)"):
        begun(net(), 1).close()
    with pytest.raises(KeyError), begun(net(), 1):
        raise KeyError  # an error in the loop is not drowned by the warning


def test_a_step_by_habit_is_harmless_and_noticed_once(recwarn: pytest.WarningsRecorder) -> None:
    model = net()
    optimizer = flora(model)
    accumulator = GradientAccumulator(optimizer, 2)
    for _ in range(4):
        accumulator.backward(loss_of(model))
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        if accumulator.complete:
            accumulator.step()
    found = [w for w in recwarn if "optimizer.step() does nothing here" in str(w.message)]
    assert len(found) == 1
    assert found[0].filename == __file__


def test_step_hooks_of_flora_run() -> None:
    model, calls = net(), []
    optimizer = flora(model)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    accumulator = begun_with(optimizer, model)
    accumulator.step()
    assert calls == [1]


def begun_with(optimizer: Flora, model: nn.Module) -> GradientAccumulator:
    accumulator = GradientAccumulator(optimizer, 2)
    for _ in range(2):
        accumulator.backward(loss_of(model))
    return accumulator
