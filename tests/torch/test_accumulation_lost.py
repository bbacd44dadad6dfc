"""An accumulator that nobody holds any more leaves the model as it was found."""

import gc
import sys
import weakref

import pytest
import torch
from torch import nn

from floragrad import Flora, GradientAccumulator


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(32, 32)


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.ones(2, 32)).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int) -> None:
    """A notebook's cell; with an odd number of micro-batches it ends inside a window."""
    accumulator = GradientAccumulator(optimizer, 2)
    for _ in range(micro_batches):
        accumulator.backward(loss_of(model))
        if accumulator.complete:
            accumulator.step()


def hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict]:
    found = [param._post_accumulate_grad_hooks or {} for param in model.parameters()]
    return [dict(each) for each in (*found, optimizer._optimizer_step_pre_hooks)]


@pytest.mark.parametrize("micro_batches", [0, 1, 2])
@pytest.mark.parametrize(
    "kind", [lambda p: Flora(p, lr=1e-3, rank=8), lambda p: torch.optim.SGD(p, lr=0.1)], ids=["release", "materialise"]
)
def test_a_lost_accumulator_gives_the_model_back(kind, micro_batches: int) -> None:
    model = net()
    optimizer = kind(model.parameters())
    before = hooks(model, optimizer)
    gc.disable()  # it is freed at once, not when the collector comes by
    try:
        train(model, optimizer, micro_batches)
        assert hooks(model, optimizer) == before
    finally:
        gc.enable()
    train(model, optimizer, 2)
    model.zero_grad()
    loss_of(model).backward()
    expected = torch.autograd.grad(loss_of(model), list(model.parameters()))
    assert all(torch.equal(param.grad, grad) for param, grad in zip(model.parameters(), expected, strict=True))


def test_the_sketches_are_freed_with_it() -> None:
    model = net()
    optimizer = Flora(model.parameters(), lr=1e-3, rank=8)
    accumulator = GradientAccumulator(optimizer, 2)
    sketches = [weakref.ref(entry.sketch) for entry in accumulator._entries]
    entry = None  # noqa: F841
    del accumulator
    assert all(sketch() is None for sketch in sketches)


def test_one_in_a_cycle_of_references_is_found_dead() -> None:
    model = net()
    optimizer = Flora(model.parameters(), lr=1e-3, rank=8)
    gc.disable()
    try:
        holder: dict = {"accumulator": GradientAccumulator(optimizer, 2)}
        holder["holder"] = holder
        del holder
        GradientAccumulator(optimizer, 2).close()
    finally:
        gc.enable()


def test_one_that_only_a_traceback_holds_is_closed_by_name_of_the_model() -> None:
    """A notebook keeps the traceback of the last error, and with it the locals of the function that failed."""

    def failing() -> None:
        accumulator = GradientAccumulator(optimizer, 2)
        accumulator.backward(loss_of(model))
        raise ZeroDivisionError

    model = net()
    optimizer = Flora(model.parameters(), lr=1e-3, rank=8)
    try:
        failing()
    except ZeroDivisionError:
        kept = sys.exc_info()
    with pytest.raises(RuntimeError, match=r"GradientAccumulator\.close_all\(model\) closes it"):
        train(model, optimizer, 2)
    with pytest.warns(UserWarning, match="drops a window of 1 micro-batches"):
        GradientAccumulator.close_all(model)
    train(model, optimizer, 2)
    GradientAccumulator.close_all(model)  # of nothing
    del kept


def test_a_constructor_that_fails_leaves_no_hooks() -> None:
    model, sparse = net(), net()
    first = GradientAccumulator(torch.optim.SGD(sparse.parameters(), lr=0.1), 2)
    optimizer = torch.optim.SGD([*model.parameters(), *sparse.parameters()], lr=0.1)
    with pytest.raises(RuntimeError, match="has a GradientAccumulator already"):
        GradientAccumulator(optimizer, 2)
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    first.close()


def test_an_optimizer_of_other_parameters_is_refused_by_name() -> None:
    """As with adapters that are put into the model after the optimizer was made."""
    base, adapter = net(), net()
    base.requires_grad_(False)
    for kind in (lambda p: Flora(p, lr=1e-3, rank=8), lambda p: torch.optim.AdamW(p, lr=1e-3)):
        for steps in (1, 2):
            accumulator = GradientAccumulator(kind(base.named_parameters()), steps)
            for _ in range(steps - 1):
                accumulator.backward(loss_of(adapter))
            with pytest.raises(
                RuntimeError, match=r"no backward pass .* \(2: weight, bias, .* 2 are frozen\).*get_peft"
            ):
                accumulator.backward(loss_of(adapter))
            accumulator.zero_grad()
            accumulator.close()


def test_the_report_outlives_the_accumulator() -> None:
    model = net()
    with GradientAccumulator(Flora(model.parameters(), lr=1e-3, rank=8), 2) as accumulator:
        before = accumulator.report()
    assert before.state_bytes > 0
    assert accumulator.report() == before
