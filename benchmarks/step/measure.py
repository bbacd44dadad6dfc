"""Workers take turns: in every round each makes one step, in a new order, while the others sleep."""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isnan, nan
from typing import Final, TypeVar

import psutil

from benchmarks.step.batches import Subject, batches, needed_bytes
from benchmarks.step.processes import Worker, WorkerError
from benchmarks.step.shapes import specs

WARM_UP: Final = 3
"""Steps that are not measured, the first of all among them."""
PAUSE: Final = 0.03
"""Seconds between two turns, in which the OpenMP threads of the worker before fall asleep."""
MEMORY_SHARE: Final = 0.8
"""Of what is available, for all workers of a batch."""

Progress = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        threads: Of every worker.
        dtype: Of parameters and gradients: ``"float32"`` or ``"bfloat16"``.
        rounds: Measured steps of each.
        limit: Seconds of steps, the first apart, after which an optimizer leaves, however many rounds are left;
            None: never.
    """

    threads: int
    dtype: str
    rounds: int
    limit: float | None = None


@dataclass
class Measured:
    """What was found of one subject.

    Attributes:
        subject: Which.
        first_seconds: Of its first step, in which states are made and code is compiled.
        seconds: Of its measured steps, which begin with its step number ``WARM_UP + 1``.
        reference_seconds: Of the reference in the same rounds.
        state_bytes: What it keeps between steps.
        peak_bytes: What a step takes on top of that; None where it is hidden from us.
        trouble: Why there are no figures, or fewer steps than asked for; empty where all went well.
    """

    subject: Subject
    first_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    reference_seconds: list[float] = field(default_factory=list)
    state_bytes: int | None = None
    peak_bytes: int | None = None
    trouble: str = ""


def measure(
    subjects: Sequence[Subject], reference: Subject, settings: Settings, progress: Progress
) -> dict[Subject, Measured]:
    """Step all subjects; those that do not fit into memory together, one batch after another.

    Args:
        subjects: What to step; the reference may be among them.
        reference: What is stepped in every batch. Its own figures are those of the first.
        settings: How.
        progress: Is told what happens.
    """
    needed = {subject: needed_bytes(subject, settings.dtype) for subject in (reference, *subjects)}
    available = round(MEMORY_SHARE * psutil.virtual_memory().available)
    together, without = batches(needed, reference, available)
    found = {subject: Measured(subject) for subject in needed}
    for subject in without:
        sizes = f"{needed[subject] / 1e9:.1f} GB beside the reference, {available / 1e9:.1f} GB are available"
        found[subject].trouble = f"needs {sizes}"
    for number, batch in enumerate(together, start=1):
        progress(f"batch {number} of {len(together)}: {len(batch)} optimizers")
        for each in _together(batch, settings, progress):
            if each.subject != reference or number == 1:
                found[each.subject] = each
    return found


def _together(batch: Sequence[Subject], settings: Settings, progress: Progress) -> list[Measured]:
    """One batch, the reference first in it."""
    with ExitStack() as stack:
        players = []
        for subject in batch:
            worker = Worker(subject.entry, specs(subject.shapes), settings.dtype, settings.threads)
            players.append(_Player(stack.enter_context(worker), Measured(subject), settings.limit))
        for player in players:
            player.attempt(player.worker.begin)
        for player in players:
            player.attempt(player.worker.ready)
        order = random.Random(0)
        for number in range(1, WARM_UP + settings.rounds + 1):
            took = _round(players, order)
            _note(players, took, number)
            spent = sum(seconds for seconds in took if not isnan(seconds))
            progress(f"step {number} of {WARM_UP + settings.rounds}: {spent:.1f} s")
        for player in players:
            player.examine()
        for player in players:
            player.worker.dismiss()
    return [player.found for player in players]


def _round(players: Sequence["_Player"], order: random.Random) -> list[float]:
    """The seconds of a step of each, in the order of the players; NaN of those that have left."""
    took = [nan] * len(players)
    for position in order.sample(range(len(players)), len(players)):
        if players[position].plays:
            time.sleep(PAUSE)
            took[position] = players[position].step()
    return took


def _note(players: Sequence["_Player"], took: Sequence[float], number: int) -> None:
    """Keep what a round has shown, beside the reference's time, which is the first."""
    if isnan(took[0]):
        found = players[0].found
        raise RuntimeError(f"{found.subject.entry}, which all are compared with, has failed: {found.trouble}")
    for player, seconds in zip(players, took, strict=True):
        if isnan(seconds):
            continue
        if number == 1:
            player.found.first_seconds = seconds
        elif number > WARM_UP:
            player.found.seconds.append(seconds)
            player.found.reference_seconds.append(took[0])
    for player in players[1:]:
        player.leave_if_slow()


@dataclass
class _Player:
    """A worker that takes turns, until it fails or is too slow.

    Attributes:
        worker: Its process.
        found: What is known of it.
        limit: Seconds of steps after which it leaves.
        spent: Seconds of steps so far, but for the first.
        plays: Whether it goes on.
    """

    worker: Worker
    found: Measured
    limit: float | None
    spent: float = 0.0
    plays: bool = True

    def attempt(self, what: Callable[[], T]) -> T | None:
        """Ask for something; a failure is written down, and is the end."""
        if not self.plays:
            return None
        try:
            return what()
        except WorkerError as error:
            self.found.trouble = str(error)
            self.plays = False
            return None

    def step(self) -> float:
        """One step's seconds, NaN where it failed."""
        answer = self.attempt(self.worker.step)
        if answer is None:
            return nan
        if self.found.first_seconds is not None:
            self.spent += answer
        return answer

    def leave_if_slow(self) -> None:
        """Step no more once the time is spent, and say so."""
        if self.plays and self.limit is not None and self.spent > self.limit:
            self.found.trouble = f"left after {self.spent:.0f} s of steps beside the first: --limit {self.limit:g}"
            self.examine()
            self.plays = False

    def examine(self) -> None:
        """What it holds."""
        held = self.attempt(self.worker.examine)
        if held is not None:
            self.found.state_bytes, self.found.peak_bytes = held
