"""``compile=`` is accepted for a release, warned of and changes nothing; models under ``torch.compile`` train."""

import warnings
from typing import Any

import pytest
import torch

from floragrad import Flora
from tests.torch.cases import Case

CASE = Case("sign", (24, 37), {"ratio": 5, "weight_decay": 0.1})


def train(optimizer: Flora, param: torch.nn.Parameter) -> torch.Tensor:
    for grad in CASE.gradients(3):
        param.grad = grad
        optimizer.step()
    return param.detach()


def plain() -> tuple[Flora, torch.nn.Parameter]:
    param = CASE.parameter()
    return Flora([param], **CASE.all_options()), param


@pytest.mark.parametrize("given", [True, False])
def test_it_is_warned_of_once_and_changes_nothing(given: bool) -> None:
    param = CASE.parameter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = Flora([param], **CASE.all_options(compile=given))
    [warning] = caught
    assert warning.category is FutureWarning
    assert warning.filename == __file__
    assert "native kernels" in str(warning.message)
    assert "compile" not in optimizer.param_groups[0]
    assert optimizer.report() == plain()[0].report()
    assert torch.equal(train(optimizer, param), train(*plain()))


def test_a_groups_own_is_warned_of_too() -> None:
    first, second = CASE.parameter(), CASE.parameter(seed=1)
    group: dict[str, Any] = {"params": [second], "compile": True}
    with pytest.warns(FutureWarning, match="no effect"):
        optimizer = Flora([{"params": [first]}, group], **CASE.all_options())
    assert group == {"params": [second], "compile": True}
    assert [each for each in optimizer.param_groups if "compile" in each] == []
    with pytest.warns(FutureWarning, match="no effect"):
        optimizer.add_param_group({"params": [CASE.parameter(seed=2)], "compile": False})


@pytest.mark.parametrize("value", [True, False])
def test_checkpoints_that_carry_it_load(value: bool) -> None:
    """Without a word: whoever loads one need not have set it."""
    optimizer, param = plain()
    saved = optimizer.state_dict()
    saved["param_groups"] = [{**group, "compile": value} for group in saved["param_groups"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    assert "compile" not in optimizer.param_groups[0]
    assert torch.equal(train(optimizer, param), train(*plain()))


def test_new_checkpoints_load_where_groups_carry_it() -> None:
    """Versions that compiled the step kept their own value, and asked the checkpoint for none."""
    saved = plain()[0].state_dict()
    assert "compile" not in saved["param_groups"][0]


def test_optimizers_that_were_pickled_with_it_go_on() -> None:
    optimizer, param = plain()
    optimizer.param_groups[0]["compile"] = optimizer.defaults["compile"] = True
    copied: Flora = Flora.__new__(Flora)
    copied.__setstate__(optimizer.__getstate__())
    copied.add_param_group({"params": [CASE.parameter(seed=1)]})
    assert [each for each in (copied.defaults, *copied.param_groups) if "compile" in each] == []
    assert torch.equal(train(copied, param), train(*plain()))


def test_a_model_under_torch_compile_trains_as_without() -> None:
    """What dynamo makes of it, without a compiler: the parameters are the model's own."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.Tanh(), torch.nn.Linear(48, 24))
        called = torch.compile(model, backend="eager") if compiled else model
        optimizer = Flora(called.parameters(), lr=1e-2, rank=4)
        for _ in range(3):
            called(torch.ones(4, 24)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([param.detach() for param in model.parameters()])
    assert all(map(torch.equal, *results))
