"""Interface of the framework that trains a run."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from floragrad.cli.machine import Gpu
from floragrad.cli.train.recorder import Recorder, Schedule


class Engine(Protocol):
    """A model, its optimizer and the steps, in one framework."""

    @property
    def libraries(self) -> Sequence[str]:
        """The distributions whose versions the result depends on."""
        ...

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that the run uses; None on a CPU."""
        ...

    @property
    def parameters(self) -> int:
        """Number of elements of all parameters."""
        ...

    def run(self, schedule: Schedule, recorder: Recorder) -> int:
        """Train until the last step, a signal, or a loss that is not finite. Returns the steps made."""
        ...

    @property
    def optimizer_state_bytes(self) -> int:
        """Bytes of the optimizer's state, measured from its arrays after the run."""
        ...

    @property
    def hidden(self) -> Mapping[str, int]:
        """``hidden_parameters`` and ``hidden_state_bytes`` of the summary; empty where they are not measured."""
        ...

    @property
    def adamw_state_bytes(self) -> int:
        """Bytes of AdamW's state for the same parameters."""
        ...

    @property
    def gradient_bytes(self) -> int:
        """One gradient of every parameter."""
        ...

    @property
    def accumulation_bytes(self) -> int:
        """Bytes of the gradients of a step's earlier micro-batches."""
        ...
