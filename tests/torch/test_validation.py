"""Tensors that are not as their plan says are refused by name before anything is updated, or stepped as they read."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from floragrad import Flora
from tests.torch.cases import Case

pytestmark = pytest.mark.filterwarnings("ignore:Flora compresses no momentum")

MATRIX = Case("matrix", (48, 40), {"rank": 8, "state_dtype": "int8"})
VECTOR = Case("vector", (40,))


class Trained:
    """A parameter that cannot be stepped any more after ``harm``, behind one that can."""

    def __init__(self, case: Case) -> None:
        self.params = [case.parameter(seed=1), case.parameter()]
        self.optimizer = Flora([("first", self.params[0]), ("second", self.params[1])], **case.all_options())
        self.step()

    @property
    def param(self) -> torch.nn.Parameter:
        return self.params[1]

    @property
    def state(self) -> dict[str, Tensor]:
        return self.optimizer.state[self.param]

    def step(self) -> None:
        for param in self.params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(5)).to(param.dtype)
        self.optimizer.step()


def resized(shape: tuple[int, ...]) -> Callable[[Trained], None]:
    def harm(trained: Trained) -> None:
        trained.param.data = torch.randn(shape)
        trained.param.grad = torch.randn(shape)

    return harm


def cast(dtype: torch.dtype, key: str) -> Callable[[Trained], None]:
    def harm(trained: Trained) -> None:
        trained.state[key] = trained.state[key].to(dtype)

    return harm


def without_storage(pick: Callable[[Trained], Tensor]) -> Callable[[Trained], None]:
    return lambda trained: pick(trained).data.untyped_storage().resize_(0)


def regrad(make: Callable[[Tensor], Tensor]) -> Callable[[Trained], None]:
    """The gradient's own tensor with other contents, where the setter of ``.grad`` would refuse another one."""

    def harm(trained: Trained) -> None:
        assert trained.param.grad is not None
        trained.param.grad.data = make(trained.param.grad)

    return harm


HARMS: dict[str, tuple[Case, Callable[[Trained], Any], str]] = {
    "grown": (MATRIX, resized((96, 40)), r"second has shape \(96, 40\), but had \(48, 40\).*construct the optimizer"),
    "shrunk": (MATRIX, resized((12, 40)), r"second has shape \(12, 40\), but had \(48, 40\)"),
    "transposed": (MATRIX, resized((40, 48)), r"second has shape \(40, 48\), but had \(48, 40\)"),
    "grown-vector": (VECTOR, resized((4096,)), r"second has shape \(4096,\), but had \(40,\)"),
    "freed": (MATRIX, without_storage(lambda each: each.param), r"second of shape \(48, 40\) has no memory"),
    "cut": (MATRIX, lambda each: each.param.data.untyped_storage().resize_(48 * 40 * 4 - 1), "second.*has no memory"),
    "gradient-shape": (MATRIX, regrad(lambda _: torch.randn(12, 40)), r"gradient of second has shape \(12, 40\)"),
    "gradient-vector": (VECTOR, regrad(lambda _: torch.randn(39)), r"gradient of second has shape \(39,\)"),
    "gradient-dtype": (MATRIX, regrad(lambda grad: grad.int()), r"gradient of second.*int32, not .*float32"),
    "gradient-freed": (MATRIX, without_storage(lambda each: each.param.grad), "gradient of second.*has no memory"),
    "cast": (MATRIX, cast(torch.float16, "row_var"), r"state\['row_var'\] of second.*float16, not.*float32"),
    "cast-scale": (MATRIX, cast(torch.bfloat16, "exp_avg_scale"), r"state\['exp_avg_scale'\] of second.*bfloat16"),
    "cast-payload": (MATRIX, cast(torch.float32, "exp_avg"), r"state\['exp_avg'\] of second.*float32, not.*int8"),
    "cast-vector": (VECTOR, cast(torch.float64, "variance"), r"state\['variance'\] of second.*float64"),
    "missing": (MATRIX, lambda each: each.state.pop("exp_avg"), r"state\['exp_avg'\] of second.*is missing"),
    "missing-step": (MATRIX, lambda each: each.state.pop("step"), r"state\['step'\] of second is missing"),
    "shorter": (MATRIX, lambda each: each.state.update(col_var=torch.ones(7)), r"'col_var'.*\(7,\).*\(40,\)"),
    "state-freed": (MATRIX, without_storage(lambda each: each.state["exp_avg"]), r"'exp_avg'.*has no memory"),
    "expanded": (
        MATRIX,
        lambda each: setattr(each.param, "data", torch.randn(48, 1).expand(48, 40)),
        "second is expanded",
    ),
}


@pytest.mark.parametrize("one_alone", [False, True], ids=["step", "step_parameter"])
@pytest.mark.parametrize("name", HARMS)
def test_what_is_not_as_planned_is_refused_before_anything_is_updated(name: str, one_alone: bool, code: str) -> None:
    case, harm, message = HARMS[name]
    trained = Trained(case)
    for param in trained.params:
        param.grad = torch.ones(param.shape)
    harm(trained)
    healthy = trained.params[0]
    before = copy.deepcopy((healthy.data, dict(trained.optimizer.state[healthy])))
    steps = [state["step"].item() for state in trained.optimizer.state.values() if "step" in state]
    step = partial(trained.optimizer.step_parameter, trained.param) if one_alone else trained.optimizer.step
    with pytest.raises(RuntimeError, match=message):
        step()
    assert torch.equal(healthy, before[0])
    for key, value in trained.optimizer.state[healthy].items():
        assert torch.equal(value, before[1][key])
    assert [state["step"].item() for state in trained.optimizer.state.values() if "step" in state] == steps


def test_a_state_that_was_cleared_begins_anew(code: str) -> None:
    """The remedy that the error names."""
    trained = Trained(MATRIX)
    trained.state["row_var"] = trained.state["row_var"].half()
    trained.state.clear()
    trained.step()
    assert trained.state["step"] == 1
    assert trained.param.isfinite().all()


# --- Loading ----------------------------------------------------------------------------------------------


def saved_as(dtype: torch.dtype, trained: Trained) -> dict[str, Any]:
    saved = trained.optimizer.state_dict()
    saved["state"] = {
        index: {
            key: value.to(dtype) if value.is_floating_point() and key != "step" else value
            for key, value in state.items()
        }
        for index, state in saved["state"].items()
    }
    return saved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_loaded_floats_are_cast_back_to_the_plan(dtype: torch.dtype, code: str) -> None:
    """And the step then is the one of a state with the values that the cast left."""
    trained, other = Trained(MATRIX), Trained(MATRIX)
    saved = saved_as(dtype, trained)
    trained.optimizer.load_state_dict(saved)
    expected = {
        key: value.to(dtype).to(value.dtype) if value.is_floating_point() and key != "step" else value.clone()
        for key, value in other.state.items()
    }
    for key, value in trained.state.items():
        assert value.dtype == expected[key].dtype
        assert torch.equal(value, expected[key])
    other.optimizer.state[other.param].update(expected)
    other.optimizer.state[other.params[0]].update(trained.optimizer.state[trained.params[0]])
    trained.step()
    other.step()
    assert torch.equal(trained.param, other.param)


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_a_loaded_payload_in_another_dtype_is_refused(state_dtype: str, dtype: torch.dtype) -> None:
    trained = Trained(Case("", (48, 40), {"rank": 8, "state_dtype": state_dtype}))
    payload = trained.state["exp_avg"].dtype
    saved = trained.optimizer.state_dict()
    saved["state"][1]["exp_avg"] = saved["state"][1]["exp_avg"].to(dtype)
    if payload == dtype:
        trained.optimizer.load_state_dict(saved)
        return
    before = copy.deepcopy(dict(trained.state))
    with pytest.raises(ValueError, match=rf"'exp_avg' in the loaded state of parameter 1 is {dtype}.*{payload}"):
        trained.optimizer.load_state_dict(saved)
    assert all(torch.equal(value, before[key]) for key, value in trained.state.items())


def test_loading_into_a_resized_parameter_is_refused() -> None:
    trained = Trained(MATRIX)
    saved = trained.optimizer.state_dict()
    trained.param.data = torch.randn(96, 40)
    with pytest.raises(RuntimeError, match=r"second has shape \(96, 40\), but had \(48, 40\)"):
        trained.optimizer.load_state_dict(saved)


# --- Layouts that are stepped as they read ----------------------------------------------------------------


def negated(values: Tensor) -> Tensor:
    """The same values, stored with the other sign and the negative bit."""
    stored = values.neg()
    return torch._neg_view(stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [MATRIX, VECTOR, Case("experts", (3, 40, 48), {"rank": 8})], ids=str)
@pytest.mark.parametrize("who", ["gradient", "parameter", "state"])
def test_the_negative_bit_is_read(who: str, case: Case, dtype: torch.dtype, code: str) -> None:
    """Equal to the same values without the bit, to the rounding of other sums; bfloat16 within its last bits."""
    trained, plain = Trained(case), Trained(case)
    for each in (trained, plain):
        for param in each.params:
            param.data = param.data.to(dtype)
    if who == "parameter":
        trained.param.data = negated(trained.param.data)
    if who == "state":
        for key in ("row_var", "variance"):
            if key in trained.state:
                trained.state[key] = negated(trained.state[key])
    for each in (trained, plain):
        for param in each.params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    if who == "gradient":
        trained.param.grad = negated(trained.param.grad)
    assert trained.param.is_neg() == (who == "parameter")
    for each in (trained, plain):
        each.optimizer.step()
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-6
    torch.testing.assert_close(trained.param.resolve_neg(), plain.param.data, rtol=tolerance, atol=tolerance)
    moved = (plain.param.float() - trained.params[0].float()).abs().max()
    assert moved > 10 * tolerance


@pytest.mark.parametrize("case", [MATRIX, VECTOR], ids=str)
def test_a_gradient_of_zeros_without_memory_is_zeros(case: Case, code: str) -> None:
    trained, plain = Trained(case), Trained(case)
    for each, make in ((trained, torch._efficientzerotensor), (plain, torch.zeros)):
        for param in each.params:
            param.grad = make(param.shape)
        each.optimizer.step()
    assert torch.equal(trained.param, plain.param)
    assert trained.state["step"] == 2


@pytest.mark.parametrize("case", [MATRIX, Case("experts", (3, 40, 48), {"rank": 8})], ids=str)
def test_a_state_with_other_strides_is_stepped_as_it_reads(case: Case, code: str) -> None:
    trained, plain = Trained(case), Trained(case)
    for key, value in trained.state.items():
        trained.state[key] = value.transpose(0, -1).contiguous().transpose(0, -1) if value.dim() > 1 else value
    for each in (trained, plain):
        each.step()
    assert torch.equal(trained.param, plain.param)


def test_inference_tensors_are_updated_where_torch_updates_them(code: str) -> None:
    with torch.inference_mode():
        param = torch.nn.Parameter(torch.ones(48, 40), requires_grad=False)
        optimizer = Flora([param], **MATRIX.all_options())
        param.grad = torch.randn(48, 40)
        optimizer.step()
        assert not torch.equal(param, torch.ones(48, 40))
    with pytest.raises(RuntimeError, match=r"parameter 0 was made under torch.inference_mode\(\)"):
        optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_a_state_allocated_under_inference_mode_is_stepped_outside(code: str) -> None:
    param = MATRIX.parameter()
    with torch.inference_mode():
        optimizer = Flora([param], **MATRIX.all_options())
        optimizer.load_state_dict(optimizer.state_dict())
    param.grad = torch.ones(48, 40)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_the_report_names_the_negative_bit() -> None:
    param = torch.nn.Parameter(negated(torch.randn(48, 40)))
    (row,) = Flora([param], lr=1e-2, rank=8).report().rows
    assert row.path == "eager (negative bit)"
