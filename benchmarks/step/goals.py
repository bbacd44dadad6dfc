"""What the figures should be, and whether they are: computed from the results alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.step.optimizers import (
    ADAPTIVE,
    FLOAT32,
    FLORA_OPT,
    FUSED,
    HF_ADAFACTOR,
    INT8,
    RANK,
    RANKS,
    TORCH_ADAFACTOR,
    at_rank,
)
from benchmarks.step.shapes import LAYERS

Results = Mapping[str, Any]
RATIO: Final = 768 // RANK
"""ρ of GPT-2 small's layers."""
ADAPTIVE_KAPPA: Final = 100
EAGER: Final = f"{INT8}, eager"
COMPARED: Final = (FUSED, INT8, FLOAT32, EAGER, FLORA_OPT, TORCH_ADAFACTOR, HF_ADAFACTOR)
"""Whose times in the table the goals hold against each other: they should be of the same rounds."""


class NotMeasuredError(Exception):
    """A figure that the results do not have; the message says which."""


@dataclass(frozen=True)
class Goal:
    """One line.

    Attributes:
        figure: What it is about.
        bound: The most that it should be.
        measure: From the results.
        digits: Of what is shown.
    """

    figure: str
    bound: float
    measure: Callable[[Results], float]
    digits: int = 2


@dataclass(frozen=True)
class Verdict:
    """A goal and what was found.

    Attributes:
        goal: Which.
        measured: The figure; None where the results do not have it.
        words: ``"met"``, ``"not met"``, or why it was not measured.
    """

    goal: Goal
    measured: float | None
    words: str


def verdicts(results: Results) -> list[Verdict]:
    """Every goal, held against the results."""
    return [_verdict(goal, results) for goal in GOALS]


def _verdict(goal: Goal, results: Results) -> Verdict:
    try:
        value = goal.measure(results)
    except NotMeasuredError as error:
        return Verdict(goal, None, f"not measured: {error}")
    return Verdict(goal, value, "met" if value <= goal.bound else "not met")


def goal_cells(results: Results) -> list[tuple[str, ...]]:
    """The table in words, the header first."""
    found: list[tuple[str, ...]] = [("figure", "goal", "measured", "verdict")]
    for each in verdicts(results):
        value = "—" if each.measured is None else f"{each.measured:.{each.goal.digits}f}"
        found.append((each.goal.figure, f"≤ {each.goal.bound:.{each.goal.digits}f}", value, each.words))
    return found


def _run(results: Results, part: str) -> Mapping[str, Any]:
    """The run that the goals are about: all threads, GPT-2 small's layers, float32."""
    runs = [run for run in results["runs"] if run["part"] == part]
    runs = [run for run in runs if (run["shapes"], run["dtype"]) == (LAYERS, "float32")]
    if not runs:
        raise NotMeasuredError(f"no {part} of {LAYERS} in float32")
    run: Mapping[str, Any] = max(runs, key=lambda run: run["threads"])
    return run


def _figure(results: Results, part: str, name: str, key: str) -> float:
    run = _run(results, part)
    for row in run["rows"]:
        if row["name"] == name and row["shapes"] == LAYERS:
            if row.get(key) is None:
                raise NotMeasuredError(f"{name}: {row['trouble'] or f'no {key}'}")
            return float(row[key])
    raise NotMeasuredError(f"{name} took no part")


def _over(name: str, *others: str, part: str = "tables") -> Callable[[Results], float]:
    """A step's time over that of the fastest of others, by way of the ratios to fused AdamW."""

    def measure(results: Results) -> float:
        own = _figure(results, part, name, "ratio")
        return own / min(_figure(results, part, other, "ratio") for other in others)

    return measure


def _peak(name: str) -> Callable[[Results], float]:
    def measure(results: Results) -> float:
        largest = _run(results, "tables")["largest_bytes"]
        return _figure(results, "tables", name, "peak_bytes") / float(largest)

    return measure


def _epoch(name: str, kappa: int | None = None) -> Callable[[Results], float]:
    """An epoch's first step over the others; averaged over all steps of an epoch of kappa."""

    def measure(results: Results) -> float:
        ratio = _figure(results, "epochs", f"{name}, short epochs", "epoch_ratio")
        return ratio if kappa is None else 1 + (ratio - 1) / kappa

    return measure


GOALS: Final = (
    Goal("step time against flora-opt with momentum", 0.10, _over(INT8, FLORA_OPT), 3),
    Goal(
        "step time against the faster of torch's and Hugging Face's Adafactor, theirs without momentum",
        0.3,
        _over(INT8, TORCH_ADAFACTOR, HF_ADAFACTOR),
    ),
    Goal("step time against fused AdamW", 1.2, _over(INT8, FUSED)),
    Goal("the same with float32 state", 1.0, _over(FLOAT32, FUSED)),
    Goal(
        f"step time at rank {RANKS[-1]} over rank {RANKS[0]}",
        1.15,
        _over(at_rank(INT8, RANKS[-1]), at_rank(INT8, RANKS[0]), part="ranks"),
    ),
    Goal("step time against fused AdamW without the native kernel, eager", 3, _over(EAGER, FUSED)),
    Goal("peak temporary bytes of an eager step, in units of the largest tensor", 1, _peak(EAGER)),
    Goal(f"the same with the native kernel: 1/ρ, ρ = {RATIO}", 1 / RATIO, _peak(INT8)),
    Goal("epoch-change step over ordinary step", 1.3, _epoch(INT8)),
    Goal('the same, projection="adaptive"', 3, _epoch(ADAPTIVE)),
    Goal(f"the same, amortised over κ = {ADAPTIVE_KAPPA}", 1.05, _epoch(ADAPTIVE, ADAPTIVE_KAPPA), 3),
)
"""All of them on GPT-2 small's layers, float32 parameters, all threads, the default rank and state."""
