"""What a run asks of the framework that does the arithmetic."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from floragrad.train.config import RunConfig
from floragrad.train.corpus import Corpus
from floragrad.train.environment import Gpu
from floragrad.train.folder import RunFolder
from floragrad.train.processes import Processes
from floragrad.train.recorder import Recorder, Schedule


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
        """How many numbers the model has."""
        ...

    def run(self, schedule: Schedule, recorder: Recorder) -> int:
        """Train until the last step, a signal, or a loss that is not finite. Returns the steps made."""
        ...

    @property
    def optimizer_state_bytes(self) -> int:
        """What the optimizer keeps between steps, measured from its arrays after the run."""
        ...

    @property
    def adamw_state_bytes(self) -> int:
        """What AdamW would keep for the same parameters."""
        ...

    @property
    def gradient_bytes(self) -> int:
        """One gradient of every parameter."""
        ...

    @property
    def accumulation_bytes(self) -> int:
        """What the gradients of a step's earlier micro-batches take."""
        ...


Start: TypeAlias = Callable[[RunConfig, RunFolder, Corpus, int, Processes], Engine]
"""What makes the engine of a run, as :func:`start` does."""


def start(config: RunConfig, folder: RunFolder, corpus: Corpus, step: int, processes: Processes) -> Engine:
    """The engine of ``--backend``, at the step of the newest checkpoint, or at 0 with new weights."""
    if config.backend == "jax":
        from floragrad.train.jax.loop import JaxEngine

        return JaxEngine(config, folder, corpus, step)
    from floragrad.train.trainer import TrainerEngine

    return TrainerEngine(config, folder, corpus, step, processes)
