"""What a run consists of: tables of step times, epochs, and growth over size and rank."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal

from benchmarks.step.batches import Subject
from benchmarks.step.goals import COMPARED
from benchmarks.step.machine import threads_in_words
from benchmarks.step.measure import Settings
from benchmarks.step.optimizers import (
    COPY,
    ENTRIES,
    EPOCHS,
    FLOAT32,
    FLORA_OPT,
    FUSED,
    GROWING,
    HF_MOMENTUM,
    INT8,
)
from benchmarks.step.shapes import LAYERS, WIDTHS, layers_of_width

Part = Literal["tables", "epochs", "sizes", "ranks"]
PARTS: Final[tuple[Part, ...]] = ("tables", "epochs", "sizes", "ranks")
EPOCH_ROUNDS: Final = 20
"""Five epochs of four steps."""
OVER_SIZES: Final = (COPY, FUSED, INT8, FLOAT32, HF_MOMENTUM, FLORA_OPT)


@dataclass(frozen=True)
class Run:
    """Optimizers that are measured together.

    Attributes:
        part: Which part of the results it is.
        shapes: What is stepped; of a growth over size, what the reference steps.
        subjects: The workers.
        settings: How.
    """

    part: Part
    shapes: str
    subjects: tuple[Subject, ...]
    settings: Settings

    @property
    def reference(self) -> Subject:
        """What every time is a ratio to."""
        return Subject(FUSED, self.shapes)

    @property
    def title(self) -> str:
        """What it is, in a line."""
        return f"{self.part}: {self.shapes}, {threads_in_words(self.settings.threads)}, {self.settings.dtype}"


@dataclass(frozen=True)
class Wanted:
    """What was asked for.

    Attributes:
        parts: Of the results.
        shapes: Of the tables.
        threads: Of the tables; the other parts take the largest.
        dtypes: Of the tables; the other parts are in the first.
        rounds: Measured steps of each optimizer; of :data:`LAYERS` in the tables.
        model_rounds: The same on whole models.
        limit: Seconds of steps after which an optimizer leaves a table that the goals do not need; None: never.
        only: What the name of an optimizer must contain one of; empty: any.
    """

    parts: Sequence[Part]
    shapes: Sequence[str]
    threads: Sequence[int]
    dtypes: Sequence[str]
    rounds: int
    model_rounds: int
    limit: float | None
    only: Sequence[str]

    def runs(self) -> list[Run]:
        """Everything to do, what the goals need first; without those in which nothing is left."""
        settings = Settings(max(self.threads), self.dtypes[0], self.rounds)
        over_epochs = Settings(settings.threads, settings.dtype, max(EPOCH_ROUNDS, self.rounds))
        sizes = [Subject(name, layers_of_width(width)) for width in WIDTHS for name in OVER_SIZES]
        every = [
            *self._tables(goals=True),
            Run("epochs", LAYERS, self._chosen(Subject(name, LAYERS) for name in EPOCHS), over_epochs),
            Run("ranks", LAYERS, self._chosen(Subject(name, LAYERS) for name in (COPY, *GROWING)), settings),
            Run("sizes", LAYERS, self._chosen(sizes), settings),
            *self._tables(goals=False),
        ]
        return [run for run in every if run.part in self.parts and run.subjects]

    def _tables(self, goals: bool) -> list[Run]:
        """The table that the goals are about, or all others."""
        found = []
        for shapes, dtype, threads in product(self.shapes, self.dtypes, sorted(self.threads, reverse=True)):
            if goals != ((shapes, dtype, threads) == (LAYERS, "float32", max(self.threads))):
                continue
            names = [name for name, entry in ENTRIES.items() if goals or not entry.is_variant]
            # Batches are filled in order: those that goals compare are in the first, in the same rounds.
            names.sort(key=lambda name: name not in COMPARED)
            rounds = self.rounds if shapes == LAYERS else self.model_rounds
            settings = Settings(threads, dtype, rounds, None if goals else self.limit)
            found.append(Run("tables", shapes, self._chosen(Subject(name, shapes) for name in names), settings))
        return found

    def _chosen(self, subjects: Iterable[Subject]) -> tuple[Subject, ...]:
        return tuple(
            subject for subject in subjects if not self.only or any(part in subject.entry for part in self.only)
        )
