"""Backends, the implementations of a step's passes, and the choice of one for each tensor."""

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from torch import Tensor

from floragrad.policy import TensorPlan
from floragrad.torch.backends import eager
from floragrad.torch.backends.cpu import step as cpu_step
from floragrad.torch.backends.triton import step as triton_step
from floragrad.torch.context import ParamUpdate
from floragrad.torch.part import Part, Passes


class Backend(Protocol):
    """Interface of a backend, a module with the three passes of a step for a list of tensors."""

    def name(self) -> str:
        """Return the backend's name, for reports."""
        ...

    def unsupported_reason(self, tensor: Tensor, plan: TensorPlan, part: Part) -> str:
        """Return why the backend cannot step a parameter, in a few words; empty where it can."""
        ...

    def supports(self, update: ParamUpdate) -> bool:
        """Return whether the backend can run this step, with its gradient and state."""
        ...

    def passes(self, updates: Sequence[ParamUpdate]) -> Iterator[Passes]:
        """Yield the passes of tensors or batches of tensors, to be run one after the other or interleaved."""
        ...


BACKENDS: Final[tuple[Backend, ...]] = (triton_step, cpu_step, eager)
"""Backends by priority; the last supports every tensor."""


def passes_of(updates: Sequence[ParamUpdate]) -> Iterator[Passes]:
    """Yield the passes of all updates, each by the first backend that supports it."""
    by_backend: list[list[ParamUpdate]] = [[] for _ in BACKENDS]
    for update in updates:
        by_backend[next(i for i, backend in enumerate(BACKENDS) if backend.supports(update))].append(update)
    for backend, taken in zip(BACKENDS, by_backend, strict=True):
        yield from backend.passes(taken)


def backend_of(tensor: Tensor, plan: TensorPlan, part: Part) -> str:
    """Return the backend that steps a parameter, in words: ``"native (…)"`` or ``"eager (why)"``."""
    other_device = f"on {tensor.device.type}"  # the reason of backends for other devices
    reasons = [other_device]
    for backend in BACKENDS:
        reason = backend.unsupported_reason(tensor, plan, part)
        if not reason:
            return f"{backend.name()} ({reasons[-1]})" if backend is BACKENDS[-1] else backend.name()
        if reason != other_device:
            reasons.append(reason)
    raise AssertionError("the last backend supports every tensor")
