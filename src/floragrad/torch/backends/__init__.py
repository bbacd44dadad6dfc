"""The implementations of a step's passes, and which of them a tensor takes."""

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from torch import Tensor

from floragrad.policy import TensorPlan
from floragrad.torch.backends import eager
from floragrad.torch.backends.cpu import step as cpu
from floragrad.torch.backends.triton import step as triton
from floragrad.torch.context import ParamUpdate
from floragrad.torch.part import Part, Sums


class Backend(Protocol):
    """The three passes of a step for a list of tensors; a module is one."""

    def name(self) -> str:
        """Return the backend's name, for reports."""
        ...

    def unsupported_reason(self, tensor: Tensor, plan: TensorPlan, part: Part) -> str:
        """Return why the backend cannot step a parameter, in a few words; empty where it can."""
        ...

    def supports(self, update: ParamUpdate) -> bool:
        """Whether the backend can make this step, with the gradient and the state that are there."""
        ...

    def steps(self, updates: Sequence[ParamUpdate]) -> Iterator[Sums]:
        """Yield the passes of tensors or batches of tensors, to be run to their ends, in order or side by side."""
        ...


BACKENDS: Final[tuple[Backend, ...]] = (triton, cpu, eager)
"""In the order in which they are asked; the last takes every tensor."""


def steps_of(updates: Sequence[ParamUpdate]) -> Iterator[Sums]:
    """Yield the passes of all updates, each by the first backend that takes it."""
    by_backend: list[list[ParamUpdate]] = [[] for _ in BACKENDS]
    for update in updates:
        by_backend[next(i for i, backend in enumerate(BACKENDS) if backend.supports(update))].append(update)
    for backend, taken in zip(BACKENDS, by_backend, strict=True):
        yield from backend.steps(taken)


def path_of(tensor: Tensor, plan: TensorPlan, part: Part) -> str:
    """Return the backend that steps a parameter, in words: ``"native (…)"`` or ``"eager (why)"``."""
    other_device = f"on {tensor.device.type}"  # what backends for other devices say
    reasons = [other_device]
    for backend in BACKENDS:
        reason = backend.unsupported_reason(tensor, plan, part)
        if not reason:
            return f"{backend.name()} ({reasons[-1]})" if backend is BACKENDS[-1] else backend.name()
        if reason != other_device:
            reasons.append(reason)
    raise AssertionError("the last backend takes every tensor")
