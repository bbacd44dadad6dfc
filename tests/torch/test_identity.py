"""A tensor's random streams belong to its number, which is kept and saved with its state, not to its position."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from floragrad import Flora

OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int4": {"state_dtype": "int4"},
    "adaptive": {"projection": "adaptive", "kappa": 4},
    "unbiased": {"residual": False, "state_dtype": "float32", "kappa": 3},
    "gaussian": {"projection": "gaussian", "state_dtype": "float32"},
    "bfloat16": {"state_dtype": "bfloat16"},
}
PER_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def model(layers: int = 3) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(32, 32, bias=False) for _ in range(layers)))


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in net.parameters():
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad.to(param.dtype) if param.requires_grad else None
        optimizer.step()


def flora(params: Any, **options: Any) -> Flora:
    return Flora(params, **{"lr": 1e-2, "rank": 4, **options})


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def copied(net: torch.nn.Module) -> torch.nn.Module:
    other = model()
    other.load_state_dict(net.state_dict())
    return other


def ids(optimizer: Flora) -> list[int]:
    return [int(optimizer.state[p]["tensor_id"]) for g in optimizer.param_groups for p in g["params"]]


@PER_OPTIONS
def test_a_state_loaded_by_name_into_another_order_goes_on_bit_for_bit(options: dict[str, Any]) -> None:
    first = model()
    optimizer = flora(first.parameters(), **options)
    train(first, optimizer, range(6))
    second = copied(first)
    reordered = flora(list(second.parameters())[::-1], **options)
    set_optimizer_state_dict(second, reordered, copy.deepcopy(get_optimizer_state_dict(first, optimizer)))
    assert ids(reordered) == [2, 1, 0]
    train(first, optimizer, range(6, 14))
    train(second, reordered, range(6, 14))
    assert_same_weights(first, second)


@PER_OPTIONS
def test_states_put_in_place_by_another_partition_go_on_bit_for_bit(options: dict[str, Any]) -> None:
    """As ZeroRedundancyOptimizer and pipelines do: one optimizer's state in two others'."""
    first = model()
    optimizer = flora(first.parameters(), **options)
    train(first, optimizer, range(6))
    second = copied(first)
    one, two, three = second.parameters()
    parts = flora([three], **options), flora([two, one], **options)
    for source, target in zip(first.parameters(), (one, two, three), strict=True):
        owner = parts[0] if target is three else parts[1]
        owner.state[target] = copy.deepcopy(optimizer.state[source])
    for step in range(6, 14):
        train(first, optimizer, range(step, step + 1))
        train(second, parts[0], range(step, step + 1))
        parts[1].step()
    assert_same_weights(first, second)


def test_another_frozen_set_keeps_numbers_and_gives_new_tensors_unused_ones() -> None:
    first = model()
    first[0].weight.requires_grad_(False)
    optimizer = flora([p for p in first.parameters() if p.requires_grad])
    train(first, optimizer, range(4))
    second = copied(first)
    optimizer_of_all = flora(second.parameters())
    saved = copy.deepcopy(get_optimizer_state_dict(first, optimizer))
    # What torch.distributed.checkpoint leaves as it is for what it has no state of.
    mine = get_optimizer_state_dict(second, optimizer_of_all)
    mine["state"].update(saved["state"])
    set_optimizer_state_dict(second, optimizer_of_all, mine)
    assert ids(optimizer_of_all)[1:] == [0, 1]
    train(first, optimizer, range(4, 10))
    train(second, optimizer_of_all, range(4, 10))
    assert_same_weights(first[1:], second[1:])


def test_a_tensor_without_saved_state_does_not_take_anothers_number() -> None:
    params = list(model().parameters())
    params[0].requires_grad_(False)
    saved = flora(params).state_dict()
    saved["state"][1]["tensor_id"].fill_(0)
    optimizer = flora(list(model().parameters()))
    optimizer.load_state_dict(saved)
    assert ids(optimizer) == [3, 0, 2]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(32, 32))]})
    assert ids(optimizer) == [3, 0, 2, 4]


def in_halves(payload: torch.Tensor, width: int) -> torch.Tensor:
    """The int4 payload as version 0.1 packed it: byte j holds columns j and ceil(k/2) + j."""
    integers = torch.stack([payload & 15, payload >> 4], dim=-1).flatten(-2)[..., :width]
    half = (width + 1) // 2
    second = torch.nn.functional.pad(integers[..., half:], (0, 2 * half - width))
    return integers[..., :half] | (second << 4)


@PER_OPTIONS
def test_states_of_earlier_releases_load_by_position(options: dict[str, Any]) -> None:
    """They count steps in float32, and have no number."""
    first = model()
    optimizer = flora(first.parameters(), **options)
    train(first, optimizer, range(6))
    saved = copy.deepcopy(optimizer.state_dict())
    for state, info in zip(saved["state"].values(), optimizer._infos.values(), strict=True):
        del state["tensor_id"]
        state["step"] = state["step"].float()
        if state.get("exp_avg", state["step"]).dtype == torch.uint8:
            state["exp_avg"] = in_halves(state["exp_avg"], info.plan.width)
    second = copied(first)
    resumed = flora(second.parameters(), **options)
    resumed.load_state_dict(saved)
    for state in resumed.state.values():
        assert state["step"].dtype == torch.int64
    train(first, optimizer, range(6, 14))
    train(second, resumed, range(6, 14))
    assert_same_weights(first, second)


def test_numbers_survive_what_the_base_class_casts() -> None:
    """torch.optim casts loaded tensors to the parameter's dtype: bfloat16 would make 257 into 256."""
    param = torch.nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16))
    optimizer = flora([param])
    saved = optimizer.state_dict()
    saved["state"][0]["tensor_id"].fill_(257)
    saved["state"][0]["step"].fill_(2**40 + 1)
    optimizer.load_state_dict(saved)
    assert ids(optimizer) == [257]
    assert optimizer.state[param]["step"].item() == 2**40 + 1


def test_copies_and_pickles_keep_their_numbers() -> None:
    first = model()
    optimizer = flora(list(first.parameters())[::-1])
    for number, state in enumerate(optimizer.state.values()):
        state["tensor_id"].fill_(7 - number)
    train(first, optimizer, range(3))
    second, clone = copy.deepcopy((first, optimizer))
    assert ids(clone) == [7, 6, 5]
    train(first, optimizer, range(3, 6))
    train(second, clone, range(3, 6))
    assert_same_weights(first, second)


def test_wrappers_keep_entries_of_their_own() -> None:
    """Lookahead's slow weights, counters, lists: stepped, saved and restored as AdamW's state has them."""

    def with_entries(make: Any) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        param = torch.nn.Parameter(torch.ones(32, 32))
        optimizer = make([param])
        for step in range(3):
            if step == 1:
                optimizer.state[param].update(slow=param.detach().clone(), calls=step, sizes=[1.5, 2.0])
                optimizer.state["wrapper"] = {"alpha": 0.5}
            param.grad = torch.ones(32, 32)
            optimizer.step()
        return param, optimizer

    for make in (lambda p: torch.optim.AdamW(p, lr=1e-2), flora):
        param, optimizer = with_entries(make)
        other = torch.nn.Parameter(param.detach().clone())
        loaded = make([other])
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        state = loaded.state[other]
        assert torch.equal(state["slow"], optimizer.state[param]["slow"])
        assert (state["calls"], state["sizes"], loaded.state["wrapper"]) == (1, [1.5, 2.0], {"alpha": 0.5})
        for each, owner in ((param, optimizer), (other, loaded)):
            each.grad = torch.ones(32, 32)
            owner.step()
        assert torch.equal(param, other)


def test_a_wrapper_may_write_to_the_state_first() -> None:
    """A frozen parameter has no state yet; whoever writes to it first does not take its momentum away."""
    param = torch.nn.Parameter(torch.ones(32, 32), requires_grad=False)
    optimizer = flora([param])
    assert not optimizer.state
    optimizer.state[param]["slow"] = param.detach().clone()
    param.requires_grad_(True)
    param.grad = torch.ones(32, 32)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1
    assert "exp_avg" in optimizer.state[param]
    assert "slow" in optimizer.state[param]


def test_int4_of_version_0_1_is_read_as_it_was_packed() -> None:
    param = torch.nn.Parameter(torch.randn(40, 70))
    optimizer = Flora([param], lr=1e-3, ratio=2, state_dtype="int4")
    for _ in range(3):
        param.grad = torch.randn_like(param)
        optimizer.step()
    old, expected = copy.deepcopy(optimizer.state_dict()), optimizer.state[param]["exp_avg"]
    state = old["state"][0]
    state["exp_avg"] = in_halves(expected, 35)
    state["step"] = state.pop("tensor_id").float() + 3
    resumed = Flora([torch.nn.Parameter(param.detach().clone())], lr=1e-3, ratio=2, state_dtype="int4")
    resumed.load_state_dict(old)
    assert torch.equal(next(iter(resumed.state.values()))["exp_avg"], expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_of_earlier_releases_load(tmp_path: Path) -> None:
    first = model()
    optimizer = flora(first.parameters())
    train(first, optimizer, range(6))
    old = copy.deepcopy(get_optimizer_state_dict(first, optimizer))
    for state in old["state"].values():
        del state["tensor_id"]
        state["step"] = state["step"].float()
    dcp.save({"optimizer": old}, checkpoint_id=tmp_path)
    second = copied(first)
    resumed = flora(second.parameters())
    found = {"optimizer": get_optimizer_state_dict(second, resumed)}
    dcp.load(found, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(second, resumed, found["optimizer"])
    train(first, optimizer, range(6, 10))
    train(second, resumed, range(6, 10))
    assert_same_weights(first, second)
