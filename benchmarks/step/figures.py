"""From seconds to what is said about them: ratios within a round, their medians and quartiles."""

from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from benchmarks.step.measure import WARM_UP, Measured
from benchmarks.step.optimizers import ALL


def ratio_figures(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of the rounds' ratios, and the median time; nothing where no step was measured.

    Example:
        >>> ratio_figures([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
        {'ratio': 2.0, 'quartiles': [2.0, 3.0], 'median_ms': 4000.0}
    """
    if not seconds:
        return {}
    ratios = [own / other for own, other in zip(seconds, reference, strict=True)]
    return {"ratio": median(ratios), "quartiles": quartiles(ratios), "median_ms": 1e3 * median(seconds)}


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third, of the values themselves and not beyond them."""
    if len(values) == 1:
        return [values[0], values[0]]
    return quantiles(values, n=4, method="inclusive")[::2]


def row(found: Measured) -> dict[str, Any]:
    """Everything that is kept of one subject."""
    return {
        "name": found.subject.entry,
        "shapes": found.subject.shapes,
        "steps": len(found.seconds),
        **ratio_figures(found.seconds, found.reference_seconds),
        "first_seconds": found.first_seconds,
        "state_bytes": found.state_bytes,
        "peak_bytes": found.peak_bytes,
        "trouble": found.trouble,
        "seconds": [round(value, 6) for value in found.seconds],
        "reference_seconds": [round(value, 6) for value in found.reference_seconds],
    }


def epoch_row(found: Measured) -> dict[str, Any]:
    """The same of one with short epochs: the steps that open an epoch over the median of the others."""
    kept = row(found)
    opens = ALL[found.subject.entry].opens
    assert opens is not None
    sorts: Mapping[bool, list[float]] = {True: [], False: []}
    for step, seconds in enumerate(found.seconds, start=WARM_UP + 1):
        sorts[opens(step)].append(seconds)
    if not sorts[True] or not sorts[False]:
        return kept
    ordinary = median(sorts[False])
    ratios = [seconds / ordinary for seconds in sorts[True]]
    return {
        **kept,
        "epochs": len(ratios),
        "epoch_ratio": median(ratios),
        "epoch_quartiles": quartiles(ratios),
        "epoch_ms": 1e3 * median(sorts[True]),
        "ordinary_ms": 1e3 * ordinary,
    }
