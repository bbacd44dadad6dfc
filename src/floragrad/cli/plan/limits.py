"""The largest batch, sequence and rank that still fit a device, found by bisection."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Final

from floragrad.cli.plan.engine import plan_subject
from floragrad.cli.plan.models import PlannedModel
from floragrad.cli.plan.result import MemoryPlan, OptimizerName, PlanSettings, Progress
from floragrad.cli.plan.tracker import Profiles

MOST_EXAMPLES: Final = 2**16
"""Nobody wants a larger micro-batch."""
MOST_TOKENS: Final = 2**20
"""Nor a longer sequence, where the model sets no limit."""


@dataclass(frozen=True)
class Limits:
    """The largest numbers that fit, each with everything else as it was asked for; 0 where none does.

    Attributes:
        batch: Examples of a micro-batch.
        sequence: Tokens of a sequence; None of a model that reads images.
        rank: Of the optimizer; None where it has none.
    """

    batch: int
    sequence: int | None
    rank: int | None

    def to_json(self) -> dict[str, int | None]:
        """Return the limits in plain types."""
        return asdict(self)


def limits_of(
    planned: MemoryPlan, model: PlannedModel, budget: int, profiles: Profiles, report: Progress
) -> dict[OptimizerName, Limits]:
    """Return the limits of every row of a plan.

    Args:
        planned: The plan.
        model: It was made for.
        budget: Bytes that there are.
        profiles: That were found out while it was made.
        report: Called with the current task.
    """
    limits = {}
    for number, (name, row) in enumerate(planned.optimizers.items()):
        report(f"the largest batch, sequence and rank with {name}", number / len(planned.optimizers))
        alone = replace(planned.settings, optimizers=(name,))
        known = {alone: row.peak}

        def peak(settings: PlanSettings, name: OptimizerName = name, known: dict[PlanSettings, int] = known) -> int:
            if settings not in known:
                known[settings] = plan_subject(model, settings, profiles=profiles).optimizers[name].peak
            return known[settings]

        limits[name] = find_limits(name, model, alone, budget, peak)
    return limits


def find_limits(
    name: OptimizerName,
    model: PlannedModel,
    settings: PlanSettings,
    budget: int,
    peak: Callable[[PlanSettings], int],
) -> Limits:
    """Find an optimizer's limits.

    Args:
        name: The optimizer.
        model: Whose positions and dimensions bound sequence and rank.
        settings: The settings.
        budget: Bytes that there are.
        peak: The optimizer's peak with other settings.
    """
    sequence = rank = None
    if model.reads_text:
        longest = model.positions or MOST_TOKENS
        sequence = largest_that_fits(
            lambda tokens: peak(replace(settings, sequence=tokens)), budget, settings.sequence, longest
        )
    if has_rank(name, settings):
        largest = model.largest_rank(sketched=name.startswith("flora"))
        rank = largest_that_fits(lambda r: peak(replace(settings, rank=r)), budget, settings.rank, largest)
    batch = largest_that_fits(
        lambda examples: peak(replace(settings, batch=examples)), budget, settings.batch, MOST_EXAMPLES
    )
    return Limits(batch, sequence, rank)


def has_rank(name: OptimizerName, settings: PlanSettings) -> bool:
    """Return whether ``rank`` determines the size of an optimizer's state."""
    return name in ("lora", "galore") or (name.startswith("flora") and settings.ratio is None)


def largest_that_fits(peak: Callable[[int], int], budget: int, start: int, most: int) -> int:
    """Return the largest number from 1 to ``most`` whose peak is within ``budget``; 0 if none is.

    Bisection that guesses by the line through the two nearest numbers known: memory grows with little curvature, so
    that a few peaks are enough. Every third guess is the middle, which bounds their number by the logarithm.

    Args:
        peak: The peak of a number, which does not fall as the number grows.
        budget: Bytes that there are.
        start: The number to begin with.
        most: The largest number that makes sense.

    Example:
        >>> largest_that_fits(lambda batch: 100 + 7 * batch, budget=1000, start=1, most=10_000)
        128
    """
    known: dict[int, int] = {}
    fitting, failing = 0, most + 1
    guess = min(max(start, 1), most)
    while failing - fitting > 1:
        known[guess] = peak(guess)
        if known[guess] <= budget:
            fitting = guess
        else:
            failing = guess
        guess = _next_guess(known, budget, fitting, failing)
    return fitting


def _next_guess(known: dict[int, int], budget: int, fitting: int, failing: int) -> int:
    """Return a number between one that fits and one that does not: on the line through known peaks, or the middle."""
    middle = (fitting + failing) // 2
    if failing not in known:
        middle = min(middle, 2 * fitting)  # nothing is known up there: do not jump into it
    if fitting not in known:
        middle = min(middle, failing // 2)
    by_line = middle
    nearest = sorted(known, key=lambda number: abs(known[number] - budget))[:2]
    if len(nearest) == 2 and len(known) % 3:
        low, high = sorted(nearest)
        rise = known[high] - known[low]
        if rise > 0:
            by_line = low + (budget - known[low]) * (high - low) // rise
    return min(max(by_line, fitting + 1), failing - 1)
