"""Random words drawn by PyTorch's operations are NumPy's, and a step on an accelerator never waits for it."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from floragrad import Flora
from floragrad._streams import Stream
from floragrad.torch.random import Philox, Request, halves, philox_words, signs

CPU = torch.device("cpu")
ACCELERATOR = "lazy"  # the one kind of device whose fake tensors can be sliced where there is no such device
WORD = st.integers(0, 2**63 - 1)
SOURCES = st.builds(Philox, WORD, WORD, WORD, st.sampled_from(list(Stream)))


@given(st.lists(st.builds(Request, SOURCES, st.integers(1, 40)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_words_drawn_by_operations_are_numpys(requests: list[Request]) -> None:
    found = philox_words(requests, CPU)
    for (source, count), words in zip(requests, found, strict=True):
        assert np.array_equal(words.numpy().view(np.uint64), source.words(count))


def test_halves_and_signs_are_bits_of_the_words() -> None:
    source = Philox(3, 1, 4, Stream.MOMENTUM)
    words = source.words(10)
    expected = words.astype("<u8").view("<i4")[:19]
    assert np.array_equal(halves(source.draw(10, CPU), 19).numpy(), expected)
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=600)
    assert np.array_equal(signs(source.draw(10, CPU), 600).numpy(), 2.0 * bits - 1)


def devices_of(tree: Any) -> list[str]:
    return [leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Launches(TorchDispatchMode):
    """Counts operations on an accelerator, copies from the host, and what waits for the accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            [x.device.type for x in tree_leaves(each) if isinstance(x, torch.Tensor)] for each in (args, result)
        )
        if ACCELERATOR in made and "cpu" in given and func is torch.ops.aten._to_copy.default:
            self.counts["copies to the device"] += 1
        elif ACCELERATOR in given and "cpu" in made:
            self.counts[f"waits: {func}"] += 1
        elif (
            ACCELERATOR in given + made and func.namespace == "aten" and not func.is_view and "empty" not in func.name()
        ):
            self.counts["launches"] += 1
        return result


SHAPES = {"matrix": (512, 256), "experts": (4, 64, 128), "convolution": (64, 32, 3, 3), "vector": (512,)}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "bfloat16": {"state_dtype": "bfloat16"},
    "int4": {"state_dtype": "int4"},
    "adaptive": {"projection": "adaptive"},
    "paper": {"residual": False, "scale_parameter": True, "weight_decay": 0.1},
    "full second moment": {"factorize_second_moment": False},
    "full second moment in int8": {"factorize_second_moment": False, "second_moment_dtype": "int8"},
}


def accelerated(options: dict[str, Any], dtype: torch.dtype, copies: int = 1) -> Counter[str]:
    """Count a resample step on an accelerator that is not there."""
    with FakeTensorMode():
        params = [
            torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=ACCELERATOR))
            for shape in SHAPES.values()
            for _ in range(copies)
        ]
        optimizer = Flora(params, **{"lr": 1e-3, "ratio": 4, "kappa": 1} | options)
        for param in params:
            param.grad = torch.empty_like(param)
        with Launches() as launches:
            optimizer.step()
    return launches.counts


@pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        # Parameters of float32 are not rounded: they draw less, and one row of theirs is enough.
        pytest.param(options, dtype, id=f"{name}-{dtype}", marks=pytest.mark.slow if is_slow else ())
        for name, options in OPTIONS.items()
        for dtype, is_slow in ((torch.bfloat16, name == "full second moment"), (torch.float32, name != "default"))
    ],
)
def test_a_step_on_an_accelerator_waits_for_nothing(options: dict[str, Any], dtype: torch.dtype) -> None:
    """It copies one small table from the host, which says what to draw."""
    counts = accelerated(options, dtype)
    assert counts["copies to the device"] <= 1, counts
    assert not [name for name in counts if name.startswith("waits")], counts


def test_words_of_many_tensors_are_drawn_at_once() -> None:
    """A draw takes about 300 launches, for any number of tensors."""
    one, two = (accelerated({}, torch.bfloat16, copies)["launches"] for copies in (1, 2))
    drawing = 2 * one - two
    assert 250 <= drawing <= 350
