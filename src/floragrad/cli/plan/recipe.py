"""The training step that fits a device, searched for, and the code that makes it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from floragrad._text import format_bytes
from floragrad.cli.plan.engine import Planner
from floragrad.cli.plan.optimizers import ROWS
from floragrad.cli.plan.result import Dtype, OptimizerName, OptimizerPlan, PlanSettings
from floragrad.cli.plan.sizes import Size

DEFAULT_UPDATE: Final = 16
"""Sequences or images of an update where one is asked for."""
MARGIN: Final = 0.04
"""Share of a device that is left for what is not counted: the driver, the libraries and the allocator's fragments."""
NOTHING: Final = (
    "No dtype, checkpointing, micro-batch or way to accumulate makes Flora's step small enough: see the remedies above."
)

_TRAINER = """\
from floragrad.transformers import FloraFactory, FloraTrainer
from transformers import TrainingArguments

{prepared}arguments = TrainingArguments(
    "run",
    per_device_train_batch_size={batch},
    gradient_accumulation_steps={accumulate},
{checkpointing})
options = {{"lr": 1e-4, {width}, "state_dtype": "{state_dtype}"}}
trainer = FloraTrainer(
    model, arguments, train_dataset=train_dataset, optimizer_cls_and_kwargs=(FloraFactory, options)
)
trainer.train()
"""
_CHECKPOINTING = """\
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
"""
_RELEASE = """\
from floragrad import Flora, GradientAccumulator, param_groups

{prepared}{checkpointing}optimizer = Flora(param_groups(model, lr=1e-4), {width}, state_dtype="{state_dtype}")
with GradientAccumulator(optimizer, steps=1) as accumulator:
    for batch in loader:  # of batch_size=1; each tensor is updated inside the backward pass
        accumulator.backward(model(**batch).loss)
        accumulator.step()
"""


@dataclass(frozen=True)
class Recipe:
    """A training step that fits.

    Attributes:
        name: The row of the plan.
        settings: The step.
        row: Its bytes.
    """

    name: OptimizerName
    settings: PlanSettings
    row: OptimizerPlan

    def describe(self, device: Size, reads_text: bool) -> str:
        """Return the step in one line."""
        settings = self.settings
        unit = f"sequences of {settings.sequence:,} tokens" if reads_text else "images"
        parts = [f"{settings.accumulate} x {settings.batch} {unit}", settings.dtype]
        parts += ["checkpointing"] if settings.checkpointing else []
        spare = format_bytes(device.nbytes - self.row.peak)
        return f"{', '.join(parts)}: {format_bytes(self.row.peak)}, {spare} to spare. To copy:"

    def code(self) -> str:
        """Return the code, for a model, a ``train_dataset`` or a ``loader`` of one's own."""
        settings = self.settings
        name, value = ("rank", settings.rank) if settings.ratio is None else ("ratio", settings.ratio)
        prepared = "model.bfloat16()\n" if settings.dtype == "bfloat16" else ""
        if self.name == "flora+release":
            checkpointing = "model.gradient_checkpointing_enable()\nmodel.train()\n"
            return _RELEASE.format(
                prepared=prepared,
                checkpointing=checkpointing if settings.checkpointing else "",
                width=f"{name}={value}",
                state_dtype=settings.state_dtype,
            )
        return _TRAINER.format(
            prepared=prepared,
            batch=settings.batch,
            accumulate=settings.accumulate,
            checkpointing=_CHECKPOINTING if settings.checkpointing else "",
            width=f'"{name}": {value}',
            state_dtype=settings.state_dtype,
        )

    def to_json(self) -> dict[str, Any]:
        """Return it in plain types."""
        names = ("dtype", "batch", "accumulate", "checkpointing")
        chosen = {name: getattr(self.settings, name) for name in names}
        return {"optimizer": self.name, **chosen, "peak": self.row.peak, "code": self.code()}


def find_recipe(planner: Planner, device: Size) -> Recipe | None:
    """Return the training step that fits a device and changes least of what was asked for; None if none does.

    The sequences of an update stay: ``batch`` times ``accumulate``, or :data:`DEFAULT_UPDATE` where that is 1. Tried in
    this order: the dtype asked for, then bfloat16; without checkpointing, unless it was asked for, then with it; the
    largest micro-batch. Where nothing fits, micro-batches of one that update inside the backward pass, without
    accumulation.

    Args:
        planner: Of the step that was asked for, on one device; what it has traced is used.
        device: The device, of which :data:`MARGIN` is left.
    """
    limit, settings = device.nbytes * (1 - MARGIN), planner.settings
    asked = settings.batch * settings.accumulate
    traced = replace(settings, accumulate=1)
    tried = [(base, planner if base == traced else Planner(planner.subject, base)) for base in _bases(settings)]
    for _, first in tried:
        found = _largest_micro_batch(first, asked if asked > 1 else DEFAULT_UPDATE, limit)
        if found is not None:
            return found
    for base, first in tried:
        row = first.row(ROWS["flora+release"], base.accumulate)
        if row.peak <= limit:
            return Recipe("flora+release", base, row)
    return None


def _largest_micro_batch(first: Planner, update: int, limit: float) -> Recipe | None:
    """Return the step with the largest micro-batch.

    Args:
        first: Planner of micro-batches of one.
        update: Sequences of an update, to be divided into micro-batches.
        limit: Bytes.
    """
    found: dict[int, Recipe] = {}

    def fits(batch: int) -> bool:
        chosen = replace(first.settings, batch=batch, accumulate=update // batch)
        name: OptimizerName = "flora" if chosen.accumulate == 1 else "flora+accumulator"
        planner = first if batch == 1 else Planner(first.subject, chosen)
        found[batch] = Recipe(name, chosen, planner.row(ROWS[name], chosen.accumulate))
        return found[batch].row.peak <= limit

    best = _largest([size for size in range(1, update + 1) if update % size == 0], fits)
    return None if best is None else found[best]


def _bases(settings: PlanSettings) -> Iterator[PlanSettings]:
    """Yield the steps of one sequence that are tried, in order."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16") if settings.dtype == "float32" else ("bfloat16",)
    for dtype in dtypes:
        for checkpointing in (True,) if settings.checkpointing else (False, True):
            yield replace(settings, dtype=dtype, checkpointing=checkpointing, batch=1, accumulate=1)


def _largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest size that fits, if the smaller ones do; the last is tried only if the others fit.

    Args:
        sizes: In ascending order. The last is a whole update, which is not accumulated and may need more.
        fits: Whether one does.

    Example:
        >>> _largest([1, 2, 4, 8], lambda size: size <= 5), _largest([1, 2], lambda size: False)
        (4, None)
    """
    if not fits(sizes[0]):
        return None
    low, high = 0, len(sizes) - 1  # sizes[low] fits, and sizes[high] is tried last
    while high - low > 1:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle
        else:
            high = middle
    if high == len(sizes) - 1 and low < high and fits(sizes[high]):
        return sizes[high]
    return sizes[low]
