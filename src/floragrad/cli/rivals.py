"""Stateless optimizers without a released package, written from their papers for comparisons only.

Both descend along a normalized gradient G of a hidden matrix (m x n: outputs x inputs) and keep nothing between steps.
The root mean square of an update's elements is 1, so that learning rates are on AdamW's scale.
"""

from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

ITERATIONS: Final = 5
"""Iterations of SinkGD, as in its paper."""


class SCALE(Optimizer):
    """Scale each output's gradient to norm √n: W ← W − lr · √n · G / ‖G‖ row by row.

    A row of torch's weight is a column in the paper, whose norm is 1; √n brings lr to AdamW's scale. The paper's
    momentum is the output head's, which is no hidden matrix.

    Args:
        params: Hidden matrices, or groups of them.
        lr: Learning rate.
        weight_decay: Decoupled, times the learning rate.

    Source: Glentis, Li, Han, Hong, "A Minimalist Optimizer Design for LLM Pretraining", arXiv 2506.16659, algorithm 1.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make a step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.sub_(self.direction(param.grad), alpha=group["lr"])
        return loss

    def direction(self, grad: Tensor) -> Tensor:
        """Return the normalized gradient."""
        return _unit_rows(grad)


class SinkGD(SCALE):
    """Scale rows to norm √n and columns to norm √m in turn, five times: W ← W − lr · Sinkhorn(G).

    The paper's lr is 0.02 and multiplied by 0.05 for hidden matrices: 1e-3 here.

    Source: Scetbon, Ma, Gong, Meeds, "Gradient Multi-Normalization for Stateless and Scalable LLM Training",
    arXiv 2502.06742, algorithms 3 and 4.
    """

    def direction(self, grad: Tensor) -> Tensor:
        """Return the normalized gradient."""
        for _ in range(ITERATIONS):
            grad = _unit_rows(_unit_rows(grad).T).T
        return grad


def _unit_rows(matrix: Tensor) -> Tensor:
    """Return the matrix with rows whose root mean square is 1; a row of zeros stays zero."""
    norms = matrix.square().mean(dim=1, keepdim=True).sqrt()
    return matrix / norms.clamp_min(torch.finfo(matrix.dtype).tiny)
