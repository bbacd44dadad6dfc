"""An accumulator goes by its optimizer's numbers, and follows its groups between two windows."""

import copy
from typing import Any

import pytest
import torch

from floragrad import Flora, GradientAccumulator


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(32, 32, bias=False) for _ in range(3)))


def flora(params: Any) -> Flora:
    return Flora(params, lr=1e-2, rank=4)


def micro_batches(net: torch.nn.Module, accumulator: GradientAccumulator, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        accumulator.backward(net(torch.randn(8, 32, generator=generator)).square().sum())
        if accumulator.complete:
            accumulator.step()


@pytest.mark.parametrize("ratio", [1, 4])
def test_a_window_goes_on_over_parameters_in_another_order(ratio: int) -> None:
    """The tensors have one shape: by position each gradient would go to another of them, in other signs."""
    first = model()
    optimizer = flora(first.parameters())
    with GradientAccumulator(optimizer, steps=4, ratio=ratio) as accumulator:
        micro_batches(first, accumulator, range(6))
        saved = copy.deepcopy(accumulator.state_dict())
        weights, states = copy.deepcopy((first.state_dict(), [optimizer.state[p] for p in first.parameters()]))
        micro_batches(first, accumulator, range(6, 12))
    second = model()
    second.load_state_dict(weights)
    reordered = flora(list(second.parameters())[::-1])
    for param, state in zip(second.parameters(), states, strict=True):
        reordered.state[param] = state  # as loading by name does
    with GradientAccumulator(reordered, steps=4, ratio=ratio) as accumulator:
        accumulator.load_state_dict(saved)
        micro_batches(second, accumulator, range(6, 12))
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_numbers_that_two_tensors_have_are_told_apart() -> None:
    first, second = model(), model()
    optimizers = [flora(first.parameters()), flora(second.parameters()), torch.optim.SGD(model().parameters(), lr=0.1)]
    with GradientAccumulator(optimizers, steps=2) as accumulator:
        assert [entry.tensor_id for entry in accumulator._entries] == list(range(9))


def test_groups_that_change_between_two_windows_are_followed() -> None:
    net = model()
    optimizer = flora(net.parameters())
    with GradientAccumulator(optimizer, steps=2) as accumulator:
        micro_batches(net, accumulator, range(2))
        gone, new = net[1].weight, torch.nn.Parameter(torch.ones(32, 32) / 32)
        net[1].weight = new
        optimizer.param_groups[0]["params"][1] = new
        before = gone.detach().clone(), new.detach().clone()
        micro_batches(net, accumulator, range(2, 4))
        assert torch.equal(gone, before[0])
        assert not torch.equal(new, before[1])
        assert [row.name for row in accumulator.report().rows] == ["parameter 0", "parameter 2", "parameter 1"]
        assert sorted(entry.tensor_id for entry in accumulator._entries) == [0, 2, 3]
        gone.grad = None
        gone.square().sum().backward()  # its hook is gone: it may be trained elsewhere
        assert gone.grad is not None


def test_a_parameter_that_leaves_inside_a_window_is_refused() -> None:
    net = model()
    optimizer = flora(net.parameters())
    with GradientAccumulator(optimizer, steps=2, clip=True) as accumulator:
        micro_batches(net, accumulator, range(1))
        del optimizer.param_groups[0]["params"][1]
        with pytest.raises(RuntimeError, match=r"parameter 1 left the groups.*zero_grad\(\) drops the window"):
            micro_batches(net, accumulator, range(1, 2))
        accumulator.zero_grad()
        micro_batches(net, accumulator, range(2, 4))
        assert optimizer.state[net[0].weight]["step"] == 1
