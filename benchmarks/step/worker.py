"""A process with one optimizer, its parameters and gradients: it steps when it is told to.

    python -m benchmarks.step.worker

The first line of its standard input says what it is; then every line asks for something. Each is answered with a line
of JSON. An error is answered with its text, and ends the process. What libraries print goes to standard error.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step.optimizers import ALL, Group, tensors_of
from benchmarks.step.state import state_bytes
from floragrad.cli.plan.tracker import MemoryTracker

GRADIENT, PARAMETER = 1e-3, 0.02
"""Standard deviations."""

ACTIVATION = 30 * 2**20
"""Bytes that are taken and given back before anything else, as training does with every activation: glibc returns
memory to the system until it has seen that much come and go, and each operation would pay for new pages."""


class Job:
    """One optimizer at work.

    Args:
        entry: Its row in the table of optimizers.
        tensors: Names, shapes and kinds of what it steps.
        dtype: Of parameters and gradients.
        threads: Torch's, within an operation.
    """

    def __init__(self, entry: str, tensors: list[tuple[str, list[int], str]], dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.empty(ACTIVATION, dtype=torch.uint8)
        self._entry = ALL[entry]
        groups = _groups(tensors, getattr(torch, dtype))
        self._gradients = {param: param.detach() * (GRADIENT / PARAMETER) for param in tensors_of(groups)}
        self._optimizers = self._entry.make(groups)

    def step(self) -> dict[str, Any]:
        """One update, and how long it took."""
        self._give_gradients()
        start = time.perf_counter()
        for optimizer in self._optimizers:
            optimizer.step()
        return {"seconds": time.perf_counter() - start}

    def examine(self) -> dict[str, Any]:
        """What is held between steps, and what a step takes on top at its peak: None where the compiler hides it."""
        kept = state_bytes(self._optimizers, [*self._gradients, *self._gradients.values()])
        if self._entry.is_compiled:
            return {"state_bytes": kept, "peak_bytes": None}
        self._give_gradients()
        with MemoryTracker() as memory:
            for optimizer in self._optimizers:
                optimizer.step()
        return {"state_bytes": kept, "peak_bytes": memory.peak}

    def _give_gradients(self) -> None:
        """Put them where they belong: flora-opt takes them away."""
        for param, gradient in self._gradients.items():
            param.grad = gradient


def _groups(tensors: Iterable[tuple[str, list[int], str]], dtype: torch.dtype) -> list[Group]:
    """Parameters by kind, their numbers the same in every process."""
    groups: dict[str, list[Tensor]] = {}
    for position, (_, shape, kind) in enumerate(tensors):
        generator = torch.Generator().manual_seed(position)
        numbers = torch.randn(shape, generator=generator).mul_(PARAMETER)
        groups.setdefault(kind, []).append(nn.Parameter(numbers.to(dtype)))
    return [{"params": params, "kind": kind} for kind, params in groups.items()]


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(words: dict[str, Any]) -> None:
        answers.write(json.dumps(words) + "\n")
        answers.flush()

    try:
        job = Job(**json.loads(sys.stdin.readline()))
        answer({})
        for line in sys.stdin:
            answer({"step": job.step, "examine": job.examine}[line.strip()]())
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
