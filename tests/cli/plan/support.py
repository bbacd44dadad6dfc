"""Plans made by hand."""

from typing import Any

from floragrad.cli.plan.result import CATEGORIES, OptimizerPlan, Sample

GIGA = 10**9


def row(peak_moment: str = "backward of model.layers.3", samples: tuple[Sample, ...] = (), **gigabytes: float) -> Any:
    """A row whose categories hold so many gigabytes each, all of them at the peak too."""
    held = {category: round(GIGA * gigabytes.get(category, 0)) for category in CATEGORIES}
    return OptimizerPlan(**held, peak=sum(held.values()), peak_moment=peak_moment, at_peak=dict(held), timeline=samples)


def sample(moment: str, **gigabytes: float) -> Sample:
    """Live gigabytes of each category at a moment."""
    return Sample(moment, tuple(round(GIGA * gigabytes.get(category, 0)) for category in CATEGORIES))
