"""What a step moves through memory and how many operations it launches, counted: seconds would flake, these do not.

A change that lets a bound be lowered should lower it.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from floragrad import Flora

SHAPE = (2048, 768)


class Traffic(TorchDispatchMode):
    """Counts operations that do something, and the bytes that they read and write: views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.launches += 1
            read = {key: value for key, value in (kwargs or {}).items() if key != "out"}
            given = [each for each in tree_leaves((args, read)) if isinstance(each, torch.Tensor)]
            made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
            written = [arg for arg, schema in zip(args, func._schema.arguments, strict=False) if _is_written(schema)]
            fresh = [each for each in made if not any(each is other for other in written)]
            self.bytes += sum(map(_nbytes, [*given, *written, *fresh]))
        return result


def _is_written(schema: Any) -> bool:
    return schema.alias_info is not None and schema.alias_info.is_write


def _nbytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0


def test_the_counter_counts() -> None:
    a, b = torch.ones(1000), torch.ones(1000)
    with Traffic() as traffic:
        (a.view(10, 100) + 1).sum()
        b.add_(a)
        torch.mul(a, a, out=b)
    assert traffic.launches == 4
    assert traffic.bytes == (8000 + 4004) + 12000 + 12000


def steady(shape: tuple[int, ...], **options: Any) -> Traffic:
    """A step between two resamplings, after the first."""
    param = torch.nn.Parameter(torch.randn(shape))
    optimizer = Flora([param], lr=1e-3, **options)
    for _ in range(2):
        param.grad = torch.randn(shape)
        with Traffic() as traffic:
            optimizer.step()
    return traffic


# Of SHAPE, in blocks of rows: operations, and passes over the tensor in float32 (reading the gradient once is one).
EAGER = {"float32": (92, 21.1), "bfloat16": (104, 24.9), "int8": (116, 25.7), "int4": (123, 26.0)}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("state_dtype", EAGER)
def test_an_eager_step(state_dtype: str) -> None:
    launches, passes = EAGER[state_dtype]
    traffic = steady(SHAPE, state_dtype=state_dtype)
    assert traffic.launches <= launches
    assert traffic.bytes <= passes * 4 * SHAPE[0] * SHAPE[1]


@pytest.mark.parametrize("state_dtype", EAGER)
@pytest.mark.parametrize("shape", [SHAPE, (8, 64, 96), (768,)], ids=str)
def test_a_native_step(shape: tuple[int, ...], state_dtype: str) -> None:
    """Counting the step and taking its scratch are all that torch does; what the kernels move is in their code."""
    traffic = steady(shape, state_dtype=state_dtype)
    assert traffic.launches <= 4
    assert traffic.bytes <= 64
