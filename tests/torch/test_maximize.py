"""``maximize=True`` is the step along −G, and weight decay shrinks all the same."""

from typing import Any

import numpy as np
import pytest
import torch

from floragrad import Flora, GradientAccumulator
from tests.torch.cases import CASES, Case
from tests.torch.oracle import assert_same_course, reference_trajectory

pytestmark = pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
ON_BOTH = pytest.mark.parametrize("code", ["eager", "baseline"], indirect=True)
DECAYED = Case("decayed", (24, 40), {"ratio": 4, "maximize": True, "weight_decay": 0.1})


def course(case: Case, sign: float, **changes: Any) -> list[torch.Tensor]:
    param = case.parameter()
    optimizer = Flora([param], **case.all_options(kappa=2, **changes))
    after = []
    for grad in case.gradients(5):
        param.grad = sign * grad
        optimizer.step()
        after.append(param.detach().clone())
    return after


@ON_BOTH
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_step_along_the_negative_gradient(case: Case, code: str) -> None:
    """Bit for bit: all of a step is odd in G, in float32."""
    up, down = course(case, 1.0, maximize=True), course(case, -1.0)
    assert all(map(torch.equal, up, down))


@ON_BOTH
def test_it_equals_the_oracle_with_decay(code: str) -> None:
    gradients = DECAYED.gradients(12)
    param = DECAYED.parameter()
    optimizer = Flora([param], **DECAYED.all_options())
    found: list[np.ndarray] = []
    for grad in gradients:
        param.grad = grad
        optimizer.step()
        found.append(param.detach().double().numpy().copy())
    assert_same_course(DECAYED, found, reference_trajectory(DECAYED, gradients))


def test_an_accumulated_window_goes_up() -> None:
    """By as much as the window of the negative loss goes down."""
    made = []
    for sign, maximize in ((1.0, True), (-1.0, False)):
        param = torch.nn.Parameter(torch.zeros(24, 40))
        optimizer = Flora([param], lr=1e-2, ratio=4, state_dtype="float32", maximize=maximize)
        target = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
        with GradientAccumulator(optimizer, 2, state_dtype="float32") as accumulator:
            for _ in range(2):
                accumulator.backward(sign * (param * target).sum())
            accumulator.step()
        made.append(param.detach())
        assert (param * target).sum() > 0
    assert torch.equal(*made)


def test_a_group_may_go_up_by_itself() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(24, 40)) for _ in range(2))
    optimizer = Flora([{"params": [first], "maximize": True}, {"params": [second]}], lr=1e-2, ratio=4)
    first.grad = second.grad = torch.ones(24, 40)
    optimizer.step()
    assert first.min() > 0 > second.max()


def test_checkpoints_of_versions_without_it_load() -> None:
    optimizer = Flora([DECAYED.parameter()], lr=1e-2, ratio=4)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["maximize"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["maximize"] is False
    [param] = optimizer.param_groups[0]["params"]
    param.grad = torch.ones_like(param)
    optimizer.step()
