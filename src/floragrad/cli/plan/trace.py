"""A model's passes and the updates of peers on fake tensors: nothing is allocated, nothing computed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from floragrad._extras import require
from floragrad.cli.peers import state_tensors
from floragrad.cli.plan.tracker import MemoryTracker, Moment, merged

masking_utils = require("transformers.masking_utils", "plan")

MAX_NORM: Final = 1.0
"""Norm that gradients are clipped to; no byte depends on it."""
BETWEEN: Final = "between passes"
"""The moment at which nothing is done."""
FOLD: Final = "fold of "
"""Prefix of the moments at which a gradient is there that is freed at once."""

Moments = tuple[Moment, ...]


@dataclass(frozen=True)
class Trace:
    """Live bytes during a training step.

    Attributes:
        first: Moments of the first update, which allocates the optimizer's state; empty where it is there before.
        steady: Of all passes, the clipping and the update of each other step.
        kept: Bytes between steps, of each category of :data:`floragrad.cli.plan.result.LASTING`.
    """

    first: Moments
    steady: Moments
    kept: tuple[int, ...]


class Tracer:
    """One model on fake tensors.

    Args:
        model: As its row trains it, on the meta device; it is copied.
        inputs: Makes a micro-batch, as keyword arguments of the model; its output has a ``loss``.

    Attributes:
        parameter_bytes: Bytes of weights and buffers, each once.
        gradient_bytes: Bytes of each trained parameter's gradient, by the moment at which it is there.
    """

    def __init__(self, model: nn.Module, inputs: Callable[[], dict[str, Tensor]]) -> None:
        self._inputs = inputs
        self._mode = FakeTensorMode()
        self._model = deepcopy(model)
        with self._mode:
            _materialise(self._model)
        self._trained = {name: param for name, param in self._model.named_parameters() if param.requires_grad}
        self._in_backward = False
        self.parameter_bytes = self._tracker().live
        self.gradient_bytes = {FOLD + name: param.nbytes for name, param in self._trained.items()}

    @cached_property
    def passes(self) -> Moments:
        """A micro-batch whose gradients are freed one by one, each at a moment of its own; see :data:`FOLD`."""
        tracker = self._tracker()
        tracker.cut()
        one_text = mock.patch.object(masking_utils, "find_packed_sequence_indices", _no_indices)
        with self._mode, one_text, tracker, ExitStack() as handles:
            for name, param in self._trained.items():
                came = partial(_gradient_came, tracker, name)
                handles.callback(param.register_post_accumulate_grad_hook(came).remove)  # type: ignore[no-untyped-call]
            for name, module in _parts(self._model):
                begins, ends = partial(self._begins, tracker, name), partial(self._ends, tracker, name)
                handles.callback(module.register_forward_pre_hook(begins).remove)
                handles.callback(module.register_forward_hook(ends).remove)
            self._pass(tracker)
            tracker.phase(BETWEEN, "activations")
        return tracker.cut()

    def accumulated(self, count: int) -> Moments:
        """Return the moments of micro-batches whose gradients are added up in ``.grad``.

        In the first one gradients stay where they would be freed; a later one adds each to what is there.
        """
        every = sum(self.gradient_bytes[each.name] for each in self.passes if each.name in self.gradient_bytes)
        first, later, held, name = [], [], 0, BETWEEN
        for moment in self.passes:
            gradient = self.gradient_bytes.get(moment.name, 0)
            name = name if gradient else moment.name
            moment = replace(moment, name=name)
            first.append(moment.plus(gradients=held))
            later.append(moment.plus(gradients=every - gradient, activations=gradient))
            held += gradient
        return merged(first) + merged(later) * (count - 1)

    @cached_property
    def clipping(self) -> Moments:
        """Clipping of all gradients."""
        with self._with_gradients() as tracker:
            tracker.phase("clipping", "temporaries")
            torch.nn.utils.clip_grad_norm_(list(self._trained.values()), MAX_NORM)
        return tracker.cut()

    def peer_trace(self, optimizer: Callable[[nn.Module], Optimizer], accumulate: int) -> Trace:
        """Return a step of an optimizer that allocates its state in its first update.

        Args:
            optimizer: Constructs the optimizer of the model.
            accumulate: Micro-batches of a step.
        """
        first, later, state = self._updates(optimizer)
        before = self.accumulated(accumulate) + self.clipping
        steady = (*(moment.plus(optimizer_state=state) for moment in before), *later)
        return Trace(first, steady, (self.parameter_bytes, state, 0))

    def _updates(self, optimizer: Callable[[nn.Module], Optimizer]) -> tuple[Moments, Moments, int]:
        """Return the moments of the first update and of each other one, and the bytes of the state."""
        with self._with_gradients() as tracker:
            made = optimizer(self._model)
            steps = []
            for _ in range(2):
                tracker.cut()
                tracker.phase("update", "temporaries", follow=True)
                made.step()
                for tensor in state_tensors(made):
                    tracker.hold(tensor, "optimizer_state")
                steps.append(tracker.cut())
            state = tracker.bytes_of("optimizer_state")
        return steps[0], steps[1], state

    def _tracker(self) -> MemoryTracker:
        tracker = MemoryTracker()
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            tracker.hold(tensor, "parameters", name)
        tracker.phase(BETWEEN, "activations")
        return tracker

    @contextmanager
    def _with_gradients(self) -> Iterator[MemoryTracker]:
        """Yield a tracker that runs, with a gradient for every trained parameter."""
        tracker = self._tracker()
        with self._mode, tracker:
            for name, param in self._trained.items():
                param.grad = torch.empty_like(param)
                tracker.hold(param.grad, "gradients", name)
            tracker.cut()
            yield tracker
        for param in self._trained.values():
            param.grad = None

    def _pass(self, tracker: MemoryTracker) -> None:
        tracker.phase("the batch", "activations")
        batch = self._inputs()
        tracker.phase("forward", "activations")
        loss = self._model(**batch).loss
        tracker.phase("backward", "activations")
        self._in_backward = True
        loss.backward()
        self._in_backward = False

    def _begins(self, tracker: MemoryTracker, name: str, *_: Any) -> None:
        # A checkpointed block may be called again in its backward pass.
        tracker.enter(f"{'backward' if self._in_backward else 'forward'} of {name}")

    def _ends(self, tracker: MemoryTracker, name: str, _: nn.Module, __: Any, output: Any) -> None:
        tensors = [each for each in tree_leaves(output) if isinstance(each, Tensor) and each.requires_grad]
        if tensors and not self._in_backward:
            enter = partial(_enter, tracker, f"backward of {name}")
            tensors[0].register_hook(enter)  # type: ignore[no-untyped-call]


def _no_indices(_: Tensor) -> None:
    """Find no packed texts: fake positions do not tell that they are of one, and a mask would be drawn up."""


def _enter(tracker: MemoryTracker, moment: str, *_: Any) -> None:
    tracker.enter(moment)


def _gradient_came(tracker: MemoryTracker, name: str, param: Tensor) -> None:
    assert param.grad is not None
    tracker.hold(param.grad, "gradients", name)
    with tracker.during(FOLD + name, "temporaries"):
        param.grad = None


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


def _materialise(model: nn.Module) -> None:
    """Give a model of the meta device tensors of the current mode on the CPU, tied ones once."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                if old not in made:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cpu")
                    is_parameter = isinstance(old, nn.Parameter)
                    made[old] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                table[name] = made[old]  # type: ignore[assignment]
