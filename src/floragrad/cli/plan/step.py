"""A training step under a tracker: its passes and its update, and the hooks that say which moment it is."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from floragrad.cli.peers import state_tensors
from floragrad.cli.plan.tracker import MemoryTracker
from floragrad.torch import GradientAccumulator

MAX_NORM: Final = 1.0
"""Norm that gradients are clipped to; no byte depends on it."""


class TrainingStep:
    """The loop that everybody writes, with moments and categories.

    Args:
        model: To train; its output has a ``loss``.
        inputs: Makes a micro-batch, as keyword arguments of the model.
        tracker: Sees everything.
    """

    def __init__(self, model: nn.Module, inputs: Callable[[], dict[str, Tensor]], tracker: MemoryTracker) -> None:
        self._model = model
        self._inputs = inputs
        self._tracker = tracker
        self._trainable = [param for param in model.parameters() if param.requires_grad]
        self._in_backward = self._is_last = False
        self._around: AbstractContextManager[None] | None = None

    def micro_batch(self, count: int, accumulator: GradientAccumulator | None, *, is_last: bool = True) -> None:
        """One forward and backward pass.

        Args:
            count: Micro-batches of the window.
            accumulator: Gathers their gradients; None: ``.grad``.
            is_last: Whether it ends the window.
        """
        self._is_last = is_last
        self._tracker.phase("the batch", "activations")
        batch = self._inputs()
        self._tracker.phase("forward", "activations")
        loss = self._model(**batch).loss
        self._tracker.phase("backward", "activations")
        self._in_backward = True
        if accumulator is None:
            (loss / count).backward()
        else:
            accumulator.backward(loss)
        self._in_backward = False
        self.rest()

    def rest(self) -> None:
        """Nothing happens until the next pass or update."""
        self._tracker.phase("between passes", "activations")

    def update(self, optimizer: Optimizer, accumulator: GradientAccumulator | None) -> None:
        """Clip, update, and free the gradients."""
        self._tracker.phase("clipping", "temporaries")
        if accumulator is None:
            torch.nn.utils.clip_grad_norm_(self._trainable, MAX_NORM)
            self._tracker.phase("update", "temporaries", follow=True)
            optimizer.step()
            optimizer.zero_grad()
        else:
            if not self._updates_early:
                accumulator.clip_grad_norm_(MAX_NORM)
            self._tracker.phase("update", "temporaries", follow=True)
            accumulator.step()
        self.rest()

    @contextmanager
    def gradient_moments(self, clip: bool | None) -> Iterator[None]:
        """Gradients count as such as soon as they are there; inside, the accumulator is to be constructed.

        Tensors made by hooks on gradients are temporary: hooks of an accumulator run between the two here.

        Args:
            clip: Of the accumulator; None where there is none.
        """
        self._updates_early = clip is False
        names = {param: name for name, param in self._model.named_parameters()}
        for param in self._trainable:
            came = partial(self._gradient_came, names[param], clip)
            param.register_post_accumulate_grad_hook(came)  # type: ignore[no-untyped-call]
        yield
        if clip is not None:
            for param in self._trainable:
                param.register_post_accumulate_grad_hook(self._gradient_went)  # type: ignore[no-untyped-call]

    @contextmanager
    def module_moments(self) -> Iterator[None]:
        """Make passes of the model's blocks, and of modules outside of them, moments of their own."""
        handles = []
        for name, module in _parts(self._model):
            handles.append(module.register_forward_pre_hook(partial(self._forward_begins, name)))
            handles.append(module.register_forward_hook(partial(self._forward_ends, name)))
        yield
        for handle in handles:
            handle.remove()

    def _forward_begins(self, name: str, *_: Any) -> None:
        # A checkpointed block may be called again in its backward pass.
        self._tracker.enter(f"{'backward' if self._in_backward else 'forward'} of {name}")

    def _forward_ends(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        first = next((each for each in _tensors(output) if each.requires_grad), None)
        if first is not None and not self._in_backward:
            first.register_hook(partial(self._backward_begins, name))  # type: ignore[no-untyped-call]

    def _backward_begins(self, name: str, *_: Any) -> None:
        self._tracker.enter(f"backward of {name}")

    def _gradient_came(self, name: str, clip: bool | None, param: Tensor) -> None:
        assert param.grad is not None
        self._tracker.hold(param.grad, "gradients", name)
        if clip is not None:
            word = "update" if self._is_last and self._updates_early else "fold"
            self._around = self._tracker.during(f"{word} of {name}", "temporaries")
            self._around.__enter__()

    def _gradient_went(self, _: Tensor) -> None:
        assert self._around is not None
        self._around.__exit__(None, None, None)


def hold_state(tracker: MemoryTracker, optimizer: Optimizer) -> bool:
    """Count an optimizer's state as such. Returns whether there is any."""
    tensors = list(state_tensors(optimizer))
    for tensor in tensors:
        tracker.hold(tensor, "optimizer_state")
    return bool(tensors)


def hold_sketches(tracker: MemoryTracker, accumulator: GradientAccumulator) -> None:
    """Count an accumulator's sketches as such."""
    for entry in accumulator._entries:
        for buffer in entry.sketch.buffers.values() if entry.sketch is not None else ():
            tracker.hold(buffer, "accumulation", entry.name)


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a model's blocks, one by one, and the largest modules that have no blocks in them."""
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from ((f"{full}.{index}", block) for index, block in enumerate(child))
        elif any(isinstance(each, nn.ModuleList) for each in child.modules()):
            yield from _parts(child, f"{full}.")
        else:
            yield full, child


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _tensors(each)
