"""SinkGD and SCALE are their papers' formulas, written once more in NumPy."""

import numpy as np
import pytest
import torch

from floragrad.cli.peers import PEERS
from floragrad.cli.rivals import SCALE, SinkGD

GENERATOR = np.random.default_rng(0)
LR, DECAY = 0.1, 0.5


def scale(grad: np.ndarray) -> np.ndarray:
    """Arxiv 2506.16659: columns of norm 1, of the (inputs x outputs) gradient, times √inputs."""
    columns = grad.T
    return (columns / np.linalg.norm(columns, axis=0) * np.sqrt(columns.shape[0])).T


def sinkgd(grad: np.ndarray) -> np.ndarray:
    """Arxiv 2502.06742, SR-Sinkhorn: X ← √n Q(X)⁻¹ X, X ← √m X R(X)⁻¹, five times."""
    rows, columns = grad.shape
    for _ in range(5):
        grad = np.sqrt(columns) * np.diag(1 / np.sqrt((grad**2).sum(1))) @ grad
        grad = np.sqrt(rows) * grad @ np.diag(1 / np.sqrt((grad**2).sum(0)))
    return grad


@pytest.mark.parametrize(("kind", "formula"), [(SCALE, scale), (SinkGD, sinkgd)])
@pytest.mark.parametrize("shape", [(5, 3), (4, 9), (1, 6)])
def test_steps_are_the_papers(kind: type[SCALE], formula: object, shape: tuple[int, int]) -> None:
    expected = GENERATOR.normal(size=shape)
    param = torch.nn.Parameter(torch.tensor(expected))
    optimizer = kind([param], lr=LR, weight_decay=DECAY)
    for _ in range(3):
        grad = GENERATOR.normal(size=shape) * 10.0 ** GENERATOR.integers(-8, 8)
        param.grad = torch.tensor(grad)
        optimizer.step()
        expected = expected - LR * DECAY * expected - LR * formula(grad)
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    assert optimizer.state == {}


@pytest.mark.parametrize("kind", [SCALE, SinkGD])
def test_a_row_without_a_gradient_stays(kind: type[SCALE]) -> None:
    param = torch.nn.Parameter(torch.ones(3, 4))
    param.grad = torch.randn(3, 4)
    param.grad[1] = 0
    kind([param], lr=LR).step()
    assert torch.equal(param[1], torch.ones(4))
    assert param.isfinite().all()
    assert not torch.equal(param[0], torch.ones(4))


def test_the_remedy_names_the_extra() -> None:
    assert PEERS["adamw"].remedy == ""
    missing = type(PEERS["adamw"])("no_such_package.optim", "Best", extra="rivals")
    assert missing.remedy == "pip install 'floragrad[rivals]'"
