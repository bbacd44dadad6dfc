"""Groups and options changed after the optimizer was made: followed as AdamW follows them, or refused by name."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from floragrad import Flora

pytestmark = pytest.mark.filterwarnings("ignore:Flora compresses no momentum")


def model() -> torch.nn.ModuleList:
    torch.manual_seed(0)
    return torch.nn.ModuleList([torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)])


def flora(params: Any, **options: Any) -> Flora:
    return Flora(params, **{"lr": 1e-2, "rank": 8, **options})


def step(optimizer: torch.optim.Optimizer, number: int = 0) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def restored(optimizer: torch.optim.Optimizer, net: torch.nn.ModuleList) -> None:
    """As Lightning's BackboneFinetuning resumes."""
    first = optimizer.param_groups[0]
    optimizer.param_groups = [first, {**first, "params": list(net[1].parameters()), "lr": 1e-3}]


def removed(optimizer: torch.optim.Optimizer, net: torch.nn.ModuleList) -> None:
    optimizer.add_param_group({"params": list(net[1].parameters())})
    step(optimizer)
    del optimizer.param_groups[0]


def appended(optimizer: torch.optim.Optimizer, _: torch.nn.ModuleList) -> None:
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(64, 64)))


def grown(optimizer: torch.optim.Optimizer, _: torch.nn.ModuleList) -> None:
    group = optimizer.param_groups[0]
    old = group["params"][0]
    group["params"][0] = torch.nn.Parameter(torch.cat([old.detach(), torch.zeros(8, 64)]))
    optimizer.state.pop(old, None)


def replaced(optimizer: torch.optim.Optimizer, _: torch.nn.ModuleList) -> None:
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.zeros(64, 64))


def reordered(optimizer: torch.optim.Optimizer, _: torch.nn.ModuleList) -> None:
    optimizer.param_groups[0]["params"].reverse()


def bare(optimizer: torch.optim.Optimizer, net: torch.nn.ModuleList) -> None:
    """Options that are missing are filled in."""
    group = {"params": list(net[1].parameters()), "lr": 1e-3}
    if not isinstance(optimizer, Flora):
        group = {**optimizer.param_groups[0], **group}
    optimizer.param_groups.append(group)


CHANGES = (restored, removed, appended, grown, replaced, reordered, bare)
Change = Callable[[torch.optim.Optimizer, torch.nn.ModuleList], None]


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("make", [lambda params: torch.optim.AdamW(params, lr=1e-2), flora], ids=["AdamW", "Flora"])
def test_known_tensors_keep_their_state_and_new_ones_begin(make: Any, change: Change) -> None:
    net = model()
    optimizer = make(list(net[0].parameters()))
    step(optimizer)
    before = {param: int(state["step"]) for param, state in optimizer.state.items()}
    change(optimizer, net)
    step(optimizer, 1)
    present = [param for group in optimizer.param_groups for param in group["params"]]
    for param in present:
        assert optimizer.state[param]["step"] == before.get(param, 1 if change is removed else 0) + 1
    if isinstance(optimizer, Flora):
        assert set(optimizer.state) == set(present), "what is gone leaves no state"
        numbers = [int(optimizer.state[param]["tensor_id"]) for param in present]
        assert len(set(numbers)) == len(numbers)
        again = flora([{**group} for group in optimizer.param_groups])
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert [int(again.state[param]["tensor_id"]) for param in present] == numbers


@pytest.mark.parametrize("change", [restored, bare], ids=lambda each: each.__name__)
def test_a_group_put_in_by_hand_is_one_that_was_added(change: Change) -> None:
    trajectories = []
    for by_hand in (True, False):
        net = model()
        optimizer = flora(list(net[0].parameters()))
        step(optimizer)
        if by_hand:
            change(optimizer, net)
        else:
            optimizer.add_param_group({"params": list(net[1].parameters()), "lr": 1e-3})
        for number in range(1, 4):
            step(optimizer, number)
        trajectories.append([param.detach().clone() for param in net.parameters()])
    assert all(map(torch.equal, *trajectories))


def test_options_of_a_group_put_in_place_of_another_are_its_own() -> None:
    """The learning rate of the new dictionary counts, though the parameters are the same."""
    param = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = flora([param])
    optimizer.param_groups = [{**optimizer.param_groups[0], "lr": 0.0}]
    step(optimizer)
    assert not param.any()


def test_a_change_that_is_refused_changes_nothing() -> None:
    param = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = flora([param])
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(4, dtype=torch.complex64)))
    param.grad = torch.ones(64, 64)
    with pytest.raises(ValueError, match=r"parameter 1 is complex"):
        optimizer.step()
    optimizer.param_groups[0]["params"][1] = param
    with pytest.raises(ValueError, match=r"parameter 0 is in the parameter groups twice"):
        optimizer.step()
    assert not param.any()
    del optimizer.param_groups[0]["params"][1]
    optimizer.step()
    assert param.any()


def test_a_parameter_of_no_group_is_not_stepped_alone() -> None:
    optimizer = flora([torch.nn.Parameter(torch.zeros(64, 64))])
    with pytest.raises(ValueError, match=r"shape \(3, 5\) is in no group"):
        optimizer.step_parameter(torch.nn.Parameter(torch.zeros(3, 5)))


LAYOUT = {
    "rank": 4,
    "ratio": 2,
    "kappa": 100,
    "seed": 1,
    "projection": "adaptive",
    "residual": False,
    "embedding_momentum": "full",
    "state_dtype": "float32",
    "factorize_second_moment": False,
    "second_moment_dtype": "int8",
    "kind": "vocabulary",
    "beta1": None,
}


@pytest.mark.parametrize("by_parameter", [False, True])
@pytest.mark.parametrize(("option", "value"), LAYOUT.items())
def test_an_option_that_the_state_depends_on_is_refused(option: str, value: Any, by_parameter: bool) -> None:
    """At the next step, before anything is updated, and by what would save it; it goes on once it is set back."""
    param = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = flora([param])
    step(optimizer)
    before, state = param.detach().clone(), copy.deepcopy(optimizer.state[param])
    [group] = optimizer.param_groups
    old, group[option] = group[option], value
    param.grad = torch.ones(64, 64)
    message = rf"{option} of the group of parameter 0 was changed from {old!r} to {value!r}.*set it back.*convert_state"
    for act in (
        (lambda: optimizer.step_parameter(param)) if by_parameter else optimizer.step,
        optimizer.state_dict,
        lambda: copy.deepcopy(optimizer),
    ):
        with pytest.raises(ValueError, match=message):
            act()
    assert torch.equal(param, before)
    assert all(torch.equal(value, optimizer.state[param][key]) for key, value in state.items())
    group[option] = old
    optimizer.step()
    assert not torch.equal(param, before)


def test_options_that_the_state_does_not_depend_on_stay_live() -> None:
    param = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = flora([param])
    step(optimizer)
    optimizer.param_groups[0].update(lr=1e-4, beta1=0.5, weight_decay=0.1, clip_threshold=2.0, decay_rate=-0.5)
    step(optimizer)
    assert optimizer.state[param]["step"] == 2


def test_a_long_vector_in_place_of_a_small_matrix_is_one_new_parameter() -> None:
    """It is a flat vector of many tensors only where nothing else is left in its group."""
    net = model()
    head, vector = torch.nn.Parameter(torch.ones(4, 64)), torch.nn.Parameter(torch.zeros(4096))
    optimizer = flora([*net.parameters(), head])
    step(optimizer)
    optimizer.param_groups[0]["params"][-1] = vector
    step(optimizer)
    assert optimizer.state[vector]["step"] == 1
    assert head not in optimizer.state


def test_beta1_stays_live_after_groups_changed_and_after_a_schedule_of_it() -> None:
    """Defaults that schedulers look for are no options of a group; what one has written is taken once."""
    kept, gone = (torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    optimizer = Flora([{"params": [kept]}, {"params": [gone]}], lr=1e-3, ratio=1)
    (group, _) = optimizer.param_groups
    del optimizer.param_groups[1]
    kept.grad = torch.ones(8, 8)
    for momentum, beta1 in ((None, 0.5), (0.7, 0.6)):
        if momentum is not None:
            group["momentum"] = momentum
        optimizer.step()
        assert group["beta1"] == (momentum or 0.9)
        group["beta1"] = beta1
        optimizer.step()
        assert group["beta1"] == beta1
        assert "momentum" not in group
        group["beta1"] = 0.9
