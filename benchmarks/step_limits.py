"""What no step can do without, in turns with fused AdamW's, on GPT-2 small's layers: the goals' limits on a machine.

    python -m benchmarks.step_limits

* Memory: every gradient and parameter read, and the parameter written, with nothing computed from squares or signs.
* PyTorch's operations on all numbers that Flora's eager step is made of, a block at a time, and no others: nothing at
  the width of a sketch, no random numbers, no Python but the loop over blocks. Twice: with every operation, and with
  gradients that are multiplied by their columns' factors once instead of twice, which would need memory as large as
  the tensor.
* Sketches of rank 256 in float32, read twice and written once, without anything else.

Medians of each round's ratio, with quartiles.
"""

import argparse
from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor

from benchmarks.step_in_turns import parameters, print_in_turns
from floragrad.torch.storage import BLOCK_ELEMENTS

RATIO = 6
"""Columns for each bucket at rank 128 and width 768."""


def stream(param: Tensor, grad: Tensor) -> None:
    """Read both, write one."""
    param.add_(grad, alpha=-1e-9)


def on_all_numbers(param: Tensor, grad: Tensor, columns: Tensor, signs: Tensor, room: Tensor, *, again: bool) -> None:
    """Squares' sums along both sides; then V = G · C, ‖V‖ of every row, encode(V); then V and decode."""
    rows, n = param.shape
    together = len(room) // n
    sums = torch.zeros(n)
    sketch = torch.zeros(rows, n // RATIO)
    sizes = torch.full((rows, 1), 1e-9)
    sliced = signs.view(RATIO, -1)
    for first in range(0, rows, together):
        g = grad[first : first + together]
        v = room[: g.numel()].view(g.shape)
        squares = torch.mul(g, g, out=v)
        sizes[first : first + together] += 0 * squares.sum(-1, keepdim=True)
        sums += squares.sum(0)
    for first in range(0, rows, together):
        g, s = grad[first : first + together], sketch[first : first + together]
        v = torch.mul(g, columns, out=room[: g.numel()].view(g.shape))
        torch.linalg.vector_norm(v, dim=-1)
        slices = v.view(len(v), RATIO, -1)
        torch.sum(torch.mul(slices, sliced, out=slices), 1, out=s)
    for first in range(0, rows, together):
        here = slice(first, first + together)
        v = room[: grad[here].numel()].view(grad[here].shape)
        if again:
            torch.mul(grad[here], columns, out=v)
        v.view(len(v), RATIO, -1).addcmul_(sketch[here].unsqueeze(1), sliced)
        param[here].addcmul_(v, sizes[here], value=-1)


def sketches(held: Tensor) -> None:
    """Read, and read and written."""
    held.sum()
    held.mul_(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's (default: all)")
    torch.set_num_threads(parser.parse_args().threads)
    params = parameters(torch.float32)
    matrices = [(param.detach(), param.grad) for param in params if param.dim() == 2 and param.grad is not None]

    room = torch.empty(BLOCK_ELEMENTS)
    columns = {n: torch.rand(n) for n in {param.shape[1] for param, _ in matrices}}
    signs = {n: torch.randn(n).sign() for n in columns}
    held = [torch.zeros(prod(param.shape) * 256 // 768) for param, _ in matrices]

    def each(step: Callable[[Tensor, Tensor, Tensor, Tensor], object]) -> None:
        for param, grad in matrices:
            step(param, grad, columns[param.shape[1]], signs[param.shape[1]])

    steps: dict[str, Callable[[], object]] = {
        "torch AdamW, fused": torch.optim.AdamW(params, lr=1e-4, fused=True).step,
        "memory": partial(each, lambda param, grad, *_: stream(param, grad)),
        "eager, on all numbers": partial(each, partial(on_all_numbers, room=room, again=True)),
        "eager, on all numbers, G · C once": partial(each, partial(on_all_numbers, room=room, again=False)),
        "sketches of rank 256": lambda: [sketches(one) for one in held],
    }
    with torch.no_grad():
        print_in_turns(steps)


if __name__ == "__main__":
    main()
