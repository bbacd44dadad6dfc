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
    at = optimizer._begin_step(param, param, param, probe).ctx
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


KERNEL = (6, 2, 4, 32)


def stepped_as(kind: Any, values: torch.Tensor, **options: Any) -> Flora:
    group = {"params": [torch.nn.Parameter(values.clone())], "kind": kind}
    optimizer = Flora([group], **{"lr": 1e-2, "state_dtype": "float32", "ratio": 2, **options})
    for seed in range(3):
        values = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
        group["params"][0].grad = values
        optimizer.step()
    return optimizer


def dense(optimizer: Flora) -> torch.Tensor:
    """The momentum of every element in float64, decoded with the pseudoinverse."""
    momentum = state_of(optimizer)["exp_avg"].double()
    info = optimizer._infos[optimizer.param_groups[0]["params"][0]]
    if info.plan.momentum == "sketch":
        momentum = momentum.view(*momentum.shape[:-1], -1) @ torch.linalg.pinv(matrix(optimizer, steps=3)).mT
    return momentum.reshape(info.plan.shape)


@pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
@pytest.mark.parametrize("options", [{}, {"ratio": 1, "factorize_second_moment": False}], ids=str)
@pytest.mark.parametrize(
    ("written", "wanted"), [(None, "convolution"), ("convolution", None), (None, "vector"), ("vector", "convolution")]
)
def test_a_momentum_is_read_in_the_view_that_it_was_written_in(written: Any, wanted: Any, options: Any) -> None:
    """Another kind is another matrix view of the same elements."""
    values = torch.randn(KERNEL, generator=torch.Generator().manual_seed(9))
    old, new = stepped_as(written, values, **options), stepped_as(wanted, values, **options)
    new.load_state_dict(new.convert_state(old.state_dict()))
    info = new._infos[new.param_groups[0]["params"][0]]
    expected = dense(old)
    if info.plan.momentum == "sketch":
        projection = matrix(new, steps=3)
        expected = expected.view(info.plan.view) @ projection.mT
    found = state_of(new)["exp_avg"].double()
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-5, atol=1e-6)
    if options:
        assert torch.equal(state_of(new)["variance"], state_of(old)["variance"])
    elif written == "vector":
        seen = state_of(old)["variance"].view(6, 256)
        torch.testing.assert_close(state_of(new)["row_var"], seen.mean(1))
        torch.testing.assert_close(state_of(new)["col_var"], seen.mean(0))
    else:
        rows, columns = state_of(old)["row_var"].double(), state_of(old)["col_var"].double()
        whole = rows.unsqueeze(-1) / rows.mean(-1, keepdim=True).unsqueeze(-1) * columns.unsqueeze(-2)
        state = state_of(new)
        means = [state["variance"]] if wanted == "vector" else [state["row_var"], state["col_var"]]
        of_view = whole.reshape(KERNEL) if wanted == "vector" else whole.reshape(info.plan.view)
        for mean, dim in zip(means, [None] if wanted == "vector" else [-1, -2], strict=True):
            expected = of_view if dim is None else of_view.mean(dim)
            torch.testing.assert_close(mean.double(), expected.reshape(mean.shape), rtol=1e-5, atol=1e-9)


def test_a_tensor_that_was_never_stepped_begins_anew() -> None:
    """A product of rows and columns of zeros would be 0 / 0."""
    values = torch.ones(24, 40)
    old = Flora([torch.nn.Parameter(values)], lr=1e-2, ratio=4)
    param = torch.nn.Parameter(values.clone())
    new = Flora([param], lr=1e-2, ratio=4, factorize_second_moment=False)
    new.load_state_dict(new.convert_state(old.state_dict()))
    param.grad = torch.ones(24, 40)
    new.step()
    assert param.isfinite().all()


def test_a_state_of_the_former_rule_begins_its_momentum_anew() -> None:
    """Earlier versions took a 64 x 640 matrix for an embedding, without momentum; no option differs."""
    written = stepped_as("vocabulary", torch.ones(64, 640)).state_dict()
    written["param_groups"][0]["kind"] = None
    new = Flora([torch.nn.Parameter(torch.ones(64, 640))], lr=1e-2, state_dtype="float32", ratio=2)
    with pytest.raises(ValueError, match="convert_state"):
        new.load_state_dict(written)
    with pytest.warns(UserWarning, match=r"starts anew for parameter 0 \(none was saved\)"):
        new.load_state_dict(new.convert_state(written))
    assert not state_of(new)["exp_avg"].any()
    assert torch.equal(state_of(new)["row_var"], written["state"][0]["row_var"])


def test_states_of_other_tensors_and_cast_payloads_are_not_converted() -> None:
    old = Flora([torch.nn.Parameter(torch.ones(24, 40))], lr=1e-2, ratio=4)
    other = Flora([torch.nn.Parameter(torch.ones(24, 64))], lr=1e-2, ratio=2)
    with pytest.raises(ValueError, match="belongs to another model"):
        other.convert_state(old.state_dict())
    saved = old.state_dict()
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].float() / 2
    with pytest.raises(ValueError, match="to which it cannot be converted"):
        Flora([torch.nn.Parameter(torch.ones(24, 40))], lr=1e-2, ratio=2).convert_state(saved)
