"""State is counted wherever an optimizer keeps it, each storage once."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from benchmarks.peers import state_bytes
from floragrad import Flora


@dataclass
class Projector:
    matrix: torch.Tensor
    owner: Any = None
    rank: int = 2


def optimizer(**state: Any) -> SimpleNamespace:
    return SimpleNamespace(state={"parameter": state})


FLOATS = torch.zeros(10)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"step": 3, "rms": 0.5, "nothing": None}, 0),
        ({"exp_avg": torch.zeros(10), "step": torch.zeros(())}, 44),
        ({"pair": (torch.zeros(10, dtype=torch.uint8), [torch.zeros(2)])}, 18),
        ({"projector": Projector(torch.zeros(3, 4))}, 48),
        ({"first": Projector(FLOATS), "second": Projector(FLOATS[:5])}, 40),
        ({"codes": TwoTensor(torch.zeros(10), torch.ones(10))}, 80),
        ({"view": torch.zeros(100)[:1]}, 400),
    ],
    ids=["numbers", "tensors", "sequences", "objects", "shared", "wrapper", "the whole storage"],
)
def test_bytes(state: dict[str, Any], expected: int) -> None:
    assert state_bytes([optimizer(**state)]) == expected


def test_two_optimizers_are_one_sum() -> None:
    assert state_bytes([optimizer(a=torch.zeros(10)), optimizer(b=torch.zeros(5), a=FLOATS, c=FLOATS)]) == 100


def test_objects_that_refer_to_each_other() -> None:
    projector = Projector(torch.zeros(5))
    projector.owner = [projector]
    assert state_bytes([optimizer(projector=projector)]) == 20


def test_parameters_and_gradients_are_no_state() -> None:
    parameter, gradient = torch.zeros(10), torch.zeros(10)
    state = optimizer(parameter=parameter, view=gradient[2:], own=torch.zeros(3))
    assert state_bytes([state], [parameter, gradient]) == 12


def test_real_optimizers() -> None:
    param = torch.nn.Parameter(torch.ones(256, 384))
    param.grad = torch.ones_like(param)
    adamw, flora = torch.optim.AdamW([param]), Flora([param], lr=1e-3, rank=32)
    adamw.step()
    flora.step()
    assert state_bytes([adamw], [param, param.grad]) == 2 * 4 * param.numel() + 4
    assert state_bytes([flora], [param, param.grad]) == flora.report().state_bytes
