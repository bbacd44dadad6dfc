"""A state converted to other options: what it says is what it said, as far as the new layout can hold it."""

import copy
from typing import Any

import pytest
import torch

from floragrad import Flora
from tests.torch.oracle import double

SHAPES = ((24, 40), (3, 24, 40), (16,), ())


def trained(**options: Any) -> Flora:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = Flora(params, **{"lr": 1e-2, "ratio": 4, "state_dtype": "float32", "kappa": 3, **options})
    for _ in range(7):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return optimizer


def converted(old: Flora, **options: Any) -> Flora:
    params = [torch.nn.Parameter(param.detach().clone()) for param in old.param_groups[0]["params"]]
    new = Flora(params, **{"lr": 1.0, "ratio": 4, "state_dtype": "float32", "kappa": 3, **options})
    saved = old.state_dict()
    before = copy.deepcopy(saved)
    new.load_state_dict(new.convert_state(saved))
    for key, state in before["state"].items():
        assert all(torch.equal(value, saved["state"][key][name]) for name, value in state.items()), "left as it is"
    assert new.param_groups[0]["lr"] == 1e-2, "live options are those that were saved"
    for param in params:
        param.grad = torch.ones_like(param)
    new.state_dict()
    return new


def state_of(optimizer: Flora, position: int = 0) -> dict[str, torch.Tensor]:
    return optimizer.state[optimizer.param_groups[0]["params"][position]]


def matrix(optimizer: Flora, position: int = 0, steps: int = 7) -> torch.Tensor:
    """P of the last step in float64, from the signs that the step drew."""
    param = optimizer.param_groups[0]["params"][position]
    probe = copy.deepcopy(optimizer.state[param])
    at = optimizer._begin_step(param, param, param, probe).at
    return torch.from_numpy(double(at.projection(steps // at.group["kappa"]).matrix()))


@pytest.mark.parametrize("change", [{"seed": 5}, {"kappa": 2}, {"ratio": 2}, {"ratio": 3}], ids=str)
@pytest.mark.parametrize("position", [0, 1])
def test_a_sketch_is_what_the_new_projection_makes_of_what_it_holds(change: dict[str, Any], position: int) -> None:
    """Z P_old⁺ P_newᵀ, with the pseudoinverse in float64."""
    old = trained()
    new = converted(old, **change)
    before, after = (state_of(each, position)["exp_avg"].double() for each in (old, new))
    expected = before @ torch.linalg.pinv(matrix(old, position)).mT @ matrix(new, position).mT
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)


def test_without_the_residual_it_is_decoded_without_bias() -> None:
    old = trained(residual=False)
    new = converted(old, residual=False, seed=5)
    expected = state_of(old)["exp_avg"].double() @ matrix(old) @ matrix(new).mT
    torch.testing.assert_close(state_of(new)["exp_avg"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", ["sign", "adaptive"])
def test_a_sketch_becomes_whole_and_a_whole_one_a_sketch(projection: Any) -> None:
    old = trained(projection=projection)
    whole = converted(old, ratio=1, projection=projection)
    again = converted(whole, projection="sign")
    if projection == "sign":
        torch.testing.assert_close(state_of(again)["exp_avg"], state_of(old)["exp_avg"], rtol=1e-5, atol=1e-6)
    else:
        weight = state_of(old)["projection_weight"].double()
        wide = state_of(old)["exp_avg"].double().repeat(1, 4) * weight  # bucket(j) = j mod k
        torch.testing.assert_close(state_of(whole)["exp_avg"].double(), wide, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("state_dtype", ["int8", "int4", "bfloat16"])
def test_another_storage_holds_the_same_sketch_within_its_rounding(state_dtype: Any) -> None:
    old = trained()
    there = converted(old, state_dtype=state_dtype)
    back = converted(there)
    before, after = state_of(old)["exp_avg"], state_of(back)["exp_avg"]
    levels = {"int8": 127, "int4": 7, "bfloat16": 128}[state_dtype]
    assert not torch.equal(before, after)
    assert ((before - after).abs().amax(-1) <= before.abs().amax(-1) / levels * 1.001).all()


def test_second_moments_are_means_and_products() -> None:
    old = trained(factorize_second_moment=False)
    new = converted(old)
    for position, dims in ((0, (24, 40)), (1, (3, 24, 40))):
        variance = state_of(old, position)["variance"].view(dims)
        torch.testing.assert_close(state_of(new, position)["row_var"], variance.mean(-1))
        torch.testing.assert_close(state_of(new, position)["col_var"], variance.mean(-2))
    whole = converted(new, factorize_second_moment=False)
    row, col = state_of(new)["row_var"], state_of(new)["col_var"]
    torch.testing.assert_close(state_of(whole)["variance"], torch.outer(row / row.mean(), col))


@pytest.mark.parametrize(
    "change",
    [
        {"ratio": None, "rank": 4},
        {"projection": "adaptive"},
        {"residual": False},
        {"projection": "gaussian"},
        {"embedding_momentum": "full"},
        {"state_dtype": "int4", "ratio": 2, "kappa": 9},
        {"beta1": None},
    ],
    ids=str,
)
def test_every_option_can_be_changed_and_training_goes_on(change: dict[str, Any]) -> None:
    new = converted(trained(), **change)
    new.step()
    assert all(state["step"] == 8 for state in new.state.values())
    assert [int(state["tensor_id"]) for state in new.state.values()] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("written", "wanted", "why"),
    [
        ({"beta1": None}, {}, "none was saved"),
        ({"projection": "gaussian"}, {"projection": "sign"}, "Gaussian projections have no orthogonal decoder"),
    ],
    ids=["no momentum", "gaussian"],
)
def test_what_cannot_be_decoded_starts_anew_with_a_warning(
    written: dict[str, Any], wanted: dict[str, Any], why: str
) -> None:
    old = trained(**written)
    with pytest.warns(UserWarning, match=rf"starts anew for parameter 0 \({why}"):
        new = converted(old, **wanted)
    assert not state_of(new)["exp_avg"].any()
    assert torch.equal(state_of(new)["row_var"], state_of(old)["row_var"])


def test_a_state_of_the_same_options_and_wrappers_entries_stay() -> None:
    old = trained()
    state_of(old)["slow"] = torch.ones(24, 40)  # type: ignore[index]
    saved = old.state_dict()
    same = old.convert_state(saved)
    assert all(same["state"][key] is state for key, state in saved["state"].items())
    assert torch.equal(state_of(converted(old, seed=3))["slow"], torch.ones(24, 40))


@pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
def test_a_state_of_something_else_is_refused() -> None:
    old = trained()
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters, this optimizer of \[4\]"):
        old.convert_state(other.state_dict())
    with pytest.raises(ValueError, match="was not written by Flora"):
        Flora([torch.nn.Parameter(torch.ones(3))], lr=1.0).convert_state(other.state_dict())
