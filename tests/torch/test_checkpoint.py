"""A resumed run is the uninterrupted one, bit for bit; a state that would be misread is refused."""

import io
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from floragrad import Flora
from floragrad.policy import SCALAR_STATE
from tests.marks import paired, slow
from tests.torch.cases import CASES, Case

pytestmark = pytest.mark.filterwarnings("ignore:Flora compresses no momentum")


def run(param: torch.nn.Parameter, optimizer: Flora, gradients: list[torch.Tensor]) -> None:
    for grad in gradients:
        param.grad = grad.clone()
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# A Gaussian projection is drawn anew in every step, which takes most of the time: one row of them always runs.
ROWS = [case for case in CASES if case.name not in ("gaussian-experts", "gaussian-wide")]
DTYPES = (torch.float32, torch.bfloat16)
STORAGE = ("float32", "bfloat16", "int8", "int4")
REST = [slow(*row) for row in product(CASES, DTYPES, STORAGE) if row[0] not in ROWS]


@pytest.mark.parametrize(("case", "dtype", "state_dtype"), [*paired(ROWS, DTYPES, STORAGE), *REST], ids=str)
def test_resume_is_exact(case: Case, dtype: torch.dtype, state_dtype: str) -> None:
    """Interrupted after step 8, resumed in new objects, over two resamplings."""
    options = case.all_options(state_dtype=state_dtype)
    gradients = case.gradients(dtype=dtype)
    whole = case.parameter(dtype)
    uninterrupted = Flora([whole], **options)
    run(whole, uninterrupted, gradients)

    first = case.parameter(dtype)
    optimizer = Flora([first], **options)
    run(first, optimizer, gradients[:8])
    saved = through_a_file({"param": first.detach(), "optimizer": optimizer.state_dict()})
    second = torch.nn.Parameter(saved["param"])
    resumed = Flora([second], **options)
    resumed.load_state_dict(saved["optimizer"])
    run(second, resumed, gradients[8:])

    assert torch.equal(whole, second)
    ends = uninterrupted.state[whole], resumed.state[second]
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key
        assert value.dtype == ends[1][key].dtype


def test_float32_state_stays_float32_on_bfloat16_parameters() -> None:
    """torch.optim casts what it loads to the parameter's dtype: half the bits would be lost."""
    param = torch.nn.Parameter(torch.ones(24, 40, dtype=torch.bfloat16))
    options = {"lr": 1e-2, "ratio": 4, "state_dtype": "float32"}
    optimizer = Flora([param], **options)
    run(param, optimizer, [torch.randn(24, 40).bfloat16()])
    loaded = Flora([torch.nn.Parameter(param.detach().clone())], **options)
    loaded.load_state_dict(optimizer.state_dict())
    [ours], [theirs] = optimizer.state.values(), loaded.state.values()
    for key, value in ours.items():
        assert theirs[key].dtype == (torch.int64 if key in SCALAR_STATE else torch.float32)
        assert torch.equal(theirs[key], value)


def test_state_moves_to_the_parameters_dtype_and_device_but_keeps_its_own_dtype() -> None:
    """A state of a float32 model goes on under float64 parameters, and on another device."""
    param = torch.nn.Parameter(torch.ones(24, 40))
    optimizer = Flora([param], lr=1e-2, ratio=4)
    run(param, optimizer, [torch.ones(24, 40)])
    for other in (torch.ones(24, 40, dtype=torch.float64), torch.ones(24, 40, device="meta")):
        loaded = Flora([torch.nn.Parameter(other)], lr=1e-2, ratio=4)
        loaded.load_state_dict(optimizer.state_dict())
        [state] = loaded.state.values()
        for key, value in optimizer.state[param].items():
            assert state[key].dtype == value.dtype
            assert state[key].device == (torch.device("cpu") if key in SCALAR_STATE else other.device)


def test_loaded_tensors_are_copies() -> None:
    param = torch.nn.Parameter(torch.ones(24, 40))
    optimizer = Flora([param], lr=1e-2, ratio=4)
    run(param, optimizer, [torch.ones(24, 40)])
    saved = optimizer.state_dict()
    kept = {key: value.clone() for key, value in saved["state"][0].items()}
    other = torch.nn.Parameter(torch.ones(24, 40))
    loaded = Flora([other], lr=1e-2, ratio=4)
    loaded.load_state_dict(saved)
    run(other, loaded, [torch.randn(24, 40)] * 3)
    assert all(torch.equal(saved["state"][0][key], value) for key, value in kept.items())


def test_what_torch_restores_is_restored() -> None:
    """Learning rates and the like come from the checkpoint, as in torch.optim."""
    saved = Flora([torch.nn.Parameter(torch.ones(24, 40))], lr=0.5, ratio=4, weight_decay=0.3).state_dict()
    optimizer = Flora([torch.nn.Parameter(torch.ones(24, 40))], lr=0.1, ratio=4)
    optimizer.load_state_dict(saved)
    [group] = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("ratio", 2),
        ("kappa", 7),
        ("seed", 1),
        ("projection", "adaptive"),
        ("residual", False),
        ("embedding_momentum", "full"),
        ("state_dtype", "int4"),
        ("factorize_second_moment", False),
        ("beta1", None),
    ],
)
def test_a_state_in_another_basis_or_layout_is_refused(option: str, value: Any) -> None:
    saved = Flora([torch.nn.Parameter(torch.ones(24, 40))], **{"lr": 0.1, "ratio": 4, option: value}).state_dict()
    param = torch.nn.Parameter(torch.ones(24, 40))
    optimizer = Flora([param], lr=0.2, ratio=4)
    with pytest.raises(ValueError, match=rf"written with {option}={value!r}.*{option}="):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert optimizer.state[param]["step"] == 0


def test_a_rank_that_differs_is_refused_by_that_name() -> None:
    saved = Flora([torch.nn.Parameter(torch.ones(24, 40))], lr=0.1, rank=4).state_dict()
    with pytest.raises(ValueError, match="rank=4, this optimizer has rank=8"):
        Flora([torch.nn.Parameter(torch.ones(24, 40))], lr=0.1, rank=8).load_state_dict(saved)


def test_another_optimizers_state_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(24, 40))
    with pytest.raises(ValueError, match="was not written by Flora"):
        Flora([param], lr=0.1, ratio=4).load_state_dict(torch.optim.AdamW([param]).state_dict())


def test_another_models_state_is_refused() -> None:
    saved = Flora([torch.nn.Parameter(torch.ones(24, 48))], lr=0.1, ratio=4).state_dict()
    with pytest.raises(ValueError, match="belongs to another model"):
        Flora([torch.nn.Parameter(torch.ones(24, 40))], lr=0.1, ratio=4).load_state_dict(saved)
    two = [torch.nn.Parameter(torch.ones(24, 48)) for _ in range(2)]
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        Flora(two, lr=0.1, ratio=4).load_state_dict(saved)


def test_gaussian_state_records_its_device_and_is_refused_on_another() -> None:
    """The device's generator draws other numbers elsewhere: what was encoded here would decode to noise."""
    param = torch.nn.Parameter(torch.ones(24, 40))
    saved = through_a_file(Flora([param], lr=0.1, ratio=4, projection="gaussian").state_dict())
    assert saved["param_groups"][0]["device_type"] == "cpu"
    Flora([param], lr=0.1, ratio=4, projection="gaussian").load_state_dict(saved)
    elsewhere = torch.nn.Parameter(torch.ones(24, 40, device="meta"))
    with pytest.raises(ValueError, match=r"drawn on cpu.*are on meta.*projection='sign'"):
        Flora([elsewhere], lr=0.1, ratio=4, projection="gaussian").load_state_dict(saved)


def test_a_state_is_loaded_for_parameters_frozen_when_it_was_saved() -> None:
    frozen = torch.nn.Parameter(torch.ones(24, 40), requires_grad=False)
    saved = Flora([frozen], lr=0.1, ratio=4).state_dict()
    assert saved["state"] == {}
    thawed = torch.nn.Parameter(torch.ones(24, 40))
    optimizer = Flora([thawed], lr=0.1, ratio=4)
    optimizer.load_state_dict(saved)
    run(thawed, optimizer, [torch.ones(24, 40)])
    assert optimizer.state[thawed]["step"] == 1


def test_states_of_the_former_rule_are_refused_by_name() -> None:
    """Earlier versions took a 64 x 640 matrix and long kernels for embeddings: their states have no momentum."""
    shapes = ((64, 640), (256, 1, 3))

    def params() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]

    written = Flora([{"params": params(), "kind": "vocabulary"}], lr=1e-3).state_dict()
    written["param_groups"][0]["kind"] = None
    optimizer = Flora(params(), lr=1e-3)
    with pytest.raises(ValueError, match=r"parameter 0 has no momentum, .*\(64, 640\) keeps one: earlier versions"):
        optimizer.load_state_dict(written)
    assert all("exp_avg" in state for state in optimizer.state.values())


def test_other_numbers_of_groups_are_refused_as_such() -> None:
    """Not as a wrong option of the first of them."""
    matrix, bias = torch.nn.Parameter(torch.ones(24, 40)), torch.nn.Parameter(torch.ones(24))
    groups = [{"params": [matrix], "kind": "matrix"}, {"params": [bias], "kind": "vector"}]
    saved = Flora(groups, lr=0.1, ratio=4).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        Flora([matrix, bias], lr=0.1, ratio=4).load_state_dict(saved)


def test_another_kind_is_refused_with_a_remedy_that_there_is() -> None:
    """Kind is an option of groups, not of the constructor."""
    saved = Flora([{"params": [torch.nn.Parameter(torch.ones(24, 40))], "kind": "matrix"}], lr=0.1).state_dict()
    with pytest.raises(ValueError, match="give that group kind='matrix'"):
        Flora([torch.nn.Parameter(torch.ones(24, 40))], lr=0.1).load_state_dict(saved)


def test_integers_of_numpy_are_saved_as_those_of_python() -> None:
    integers = {name: np.int64(value) for name, value in {"ratio": 4, "kappa": 10, "seed": 3}.items()}
    groups = Flora([torch.nn.Parameter(torch.ones(24, 40))], lr=0.1, **integers).state_dict()
    assert through_a_file(groups)["param_groups"][0]["kappa"] == 10


@pytest.mark.parametrize("step", [7, 2.0**24 + 1])
def test_a_step_saved_as_a_number_is_loaded(step: float) -> None:
    """As torch.optim's own optimizers take it, and exactly whatever the default dtype."""
    param = torch.nn.Parameter(torch.ones(24, 40))
    saved = Flora([param], lr=0.1, ratio=4).state_dict()
    saved["state"][0]["step"] = step
    optimizer = Flora([param], lr=0.1, ratio=4)
    optimizer.load_state_dict(saved)
    assert optimizer.state[param]["step"] == int(step)
    assert optimizer.state[param]["step"].dtype == torch.int64
