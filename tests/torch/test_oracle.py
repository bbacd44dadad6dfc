"""Every path equals the float64 oracle, step by step, over 25 steps and two resamplings."""

import math

import pytest
import torch

from floragrad import Flora
from floragrad.torch import storage
from tests.torch.cases import CASES, STEPS, Case, cases
from tests.torch.oracle import assert_same_course, reference_trajectory, trajectory


@pytest.mark.usefixtures("code")
@pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case: Case) -> None:
    gradients = case.gradients()
    assert_same_course(case, trajectory(case, gradients), reference_trajectory(case, gradients))


# A vocabulary has thousands of blocks: one row has, and others with make test-slow.
QUICK = {case.name for case in CASES} - {"vocabulary", "vocabulary-full", "gaussian-wide"}


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
@pytest.mark.parametrize("case", cases(quick=QUICK), ids=str)
def test_equals_the_oracle_in_small_blocks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one or a few rows, and of several matrices of a stack, meet the same oracle."""
    gradients = case.gradients()
    expected = reference_trajectory(case, gradients)
    monkeypatch.setattr(storage, "SMALL_TENSOR_ELEMENTS", 0)
    for elements in (each for each in (1, 200, 1500) if math.prod(case.shape) < 1000 * each):
        monkeypatch.setattr(storage, "BLOCK_ELEMENTS", elements)
        assert_same_course(case, trajectory(case, gradients), expected)


@pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_missing_gradient_leaves_parameter_and_state_alone(case: Case) -> None:
    param = case.parameter()
    optimizer = Flora([param], **case.all_options())
    before = {key: value.clone() for key, value in optimizer.state[param].items()}
    start = param.detach().clone()
    for _ in range(STEPS):
        optimizer.step()
    assert torch.equal(param, start)
    assert all(torch.equal(before[key], value) for key, value in optimizer.state[param].items())
