"""The work on one tensor, done for the first tensor of each layout and repeated by its bytes for the others.

Flora and its accumulator go through a tensor in blocks of rows, tens of thousands of them in a large model. What
they make on the way depends on the tensor's layout and on options alone.
"""

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from floragrad.planning.tracker import MemoryTracker
from floragrad.torch import optimizer as flora
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.tensor_step import State, TensorStep


@contextmanager
def repeated_work(tracker: MemoryTracker) -> Iterator[None]:
    """Inside, every update, fold and decoding of a tensor goes through :meth:`MemoryTracker.once`.

    What is decoded counts as a gradient.
    """
    step, add = flora.step_tensor, GradientSketch.add
    decode, norm = GradientSketch.decode_into, GradientSketch.squared_norm

    def step_tensor(param: Tensor, grad: Tensor, state: State, at: TensorStep) -> None:
        tracker.touch(param)
        options = tuple(sorted((key, value) for key, value in at.group.items() if key not in _NOT_OPTIONS))
        key = ("update", _layout(param), _layout(grad), at.plan, options, at.opens_epoch)
        tracker.once(key, lambda: step(param, grad, state, at))

    def add_gradient(sketch: GradientSketch, grad: Tensor, *args: Any, measure_noise: bool) -> None:
        folds = sketch.folds
        key = ("fold", _layout(grad), sketch.plan, folds == 0, measure_noise)
        tracker.once(key, lambda: add(sketch, grad, *args, measure_noise=measure_noise))
        sketch.folds = folds + 1

    def decode_into(sketch: GradientSketch, grad: Tensor, window: int, own: float, factor: float | Tensor) -> None:
        tracker.hold(grad, "gradients")
        key = ("decode", _layout(grad), sketch.plan, bool(own), isinstance(factor, Tensor))
        tracker.once(key, lambda: decode(sketch, grad, window, own, factor))

    def squared_norm(sketch: GradientSketch) -> Tensor:
        def work() -> None:
            norm(sketch)

        tracker.once(("norm", sketch.plan), work)
        return torch.zeros(())

    with ExitStack() as stack:
        stack.enter_context(replaced(GradientSketch, "decode_into", decode_into))
        if tracker.repeats:
            stack.enter_context(replaced(flora, "step_tensor", step_tensor))
            stack.enter_context(replaced(GradientSketch, "add", add_gradient))
            stack.enter_context(replaced(GradientSketch, "squared_norm", squared_norm))
        yield


_NOT_OPTIONS = ("params", "param_names")


def _layout(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
