"""Settings and results of a plan: plain data, no framework.

Bytes are integers; every category is counted at the storages that hold it, each storage once.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, get_args

from floragrad.cli.options import option, options_of
from floragrad.policy import StateDtype

STEP, COMPARED, DEVICE = "Training step", "Optimizers", "Devices"

OptimizerName = Literal[
    "adamw", "adamw-8bit", "adafactor", "lora", "galore", "flora", "flora+accumulator", "flora+release"
]
Dtype = Literal["float32", "bfloat16"]

OPTIMIZERS: Final[tuple[OptimizerName, ...]] = get_args(OptimizerName)
"""The rows of a plan, in the order in which they are shown."""
CATEGORIES: Final = (
    "parameters",
    "optimizer_state",
    "accumulation",
    "gradients",
    "buckets",
    "activations",
    "temporaries",
)
"""Purposes of bytes, from the longest lived to the shortest lived."""

LASTING: Final = ("parameters", "optimizer_state", "accumulation")
"""The categories that stay from step to step."""

Progress = Callable[[str, float], None]
"""Callback with the current task and the finished fraction of the whole, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The training step that is planned: the options of ``floragrad plan``, with their names and defaults.

    Raises:
        ValueError: A setting has a wrong value.

    Example:
        >>> PlanSettings(batch=4, accumulate=16).accumulate
        16
    """

    batch: int = option("Sequences or images of a micro-batch, on each device.", STEP, default=1, minimum=1)
    sequence: int = option(
        "Tokens of a sequence.",
        STEP,
        default=1024,
        shown="1024, or what the model reads where that is less",
        minimum=1,
        flag="--sequence-length",
    )
    dtype: Dtype = option("Of the weights and the computation.", STEP, default="float32", choices=get_args(Dtype))
    accumulate: int = option("Micro-batches whose gradients make a step.", STEP, default=1, minimum=1)
    checkpointing: bool = option("Recompute activations block by block.", STEP, default=False)
    optimizers: tuple[OptimizerName, ...] = option(
        f"Rows to compare: {', '.join(OPTIMIZERS)}.",
        COMPARED,
        default=OPTIMIZERS,
        shown="all",
        metavar="NAME,NAME,…",
        choices=OPTIMIZERS,
        example="adamw,flora",
    )
    rank: int = option(
        "Of Flora, GaLore and LoRA.",
        COMPARED,
        default=128,
        shown="128, or a quarter of the hidden size where that is less",
        minimum=1,
    )
    ratio: int | None = option(
        "Flora: columns that share one element of the momentum, the same for every tensor, instead of --rank.",
        COMPARED,
        default=None,
        minimum=1,
    )
    state_dtype: StateDtype = option(
        "Flora: how the momentum is stored.", COMPARED, default="int8", choices=get_args(StateDtype)
    )
    ddp: int = option("Devices that hold the whole model each.", DEVICE, default=1, minimum=1)
    fsdp: int = option("Devices that share the model (FSDP2).", DEVICE, default=1, minimum=1)
    defer_reduction: bool = option(
        "FSDP2: reduce gradients once in a step instead of in every micro-batch; until then each device keeps whole "
        "ones, and flora+accumulator whole sketches.",
        DEVICE,
        default=False,
    )

    def __post_init__(self) -> None:
        for name, each in options_of(PlanSettings).items():
            fault = each.fault(name, getattr(self, name)) if getattr(self, name) is not None else None
            if fault is not None:
                raise ValueError(fault)
        if not self.optimizers:
            raise ValueError(f"optimizers is empty: choose from {', '.join(OPTIMIZERS)}")
        if self.ddp > 1 and self.fsdp > 1:
            raise ValueError(f"ddp={self.ddp} and fsdp={self.fsdp}: give one of them; what of the other is left out")
        if self.defer_reduction and 1 in (self.fsdp, self.accumulate):
            raise ValueError(
                f"defer_reduction with fsdp={self.fsdp} and accumulate={self.accumulate}: it defers what FSDP2 does in "
                "each of several micro-batches; give 2 or more of both, or leave it out"
            )


@dataclass(frozen=True)
class Sample:
    """Live bytes at one moment of a step.

    Attributes:
        moment: ``"forward of model.layers.3"``, ``"backward of model.layers.3"``, ``"update of lm_head.weight"``, …
        bytes: Of each category, in the order of :data:`CATEGORIES`.
    """

    moment: str
    bytes: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.bytes)


@dataclass(frozen=True)
class OptimizerPlan:
    """One row of a plan: bytes of one optimizer's training step on one device.

    ``parameters``, ``optimizer_state`` and ``accumulation`` stay from step to step. Of the others it is the most
    that is held at once in a step; these need not fall together, so that the peak is at most the sum of all.

    Attributes:
        parameters: Bytes of all weights, frozen ones and a model's buffers too.
        optimizer_state: Of the optimizer's state between steps.
        accumulation: Of the sketches of :class:`floragrad.GradientAccumulator`.
        gradients: Of gradients, at most.
        buckets: Of communication: DDP's buckets, FSDP2's gathered weights and gradients.
        activations: Of tensors of the forward and backward passes, at most; the batch and the logits too.
        temporaries: Of tensors that an update or a fold makes and frees again, at most.
        peak: The most bytes that live at once, all categories together.
        peak_moment: When that is.
        at_peak: Bytes of each category then.
        timeline: A step in the steady state: the highest sample of every moment, in order.
        sent: Bytes of gradients, or of sketches of them, that the device sends in a step; 0 with one device.
    """

    parameters: int
    optimizer_state: int
    accumulation: int
    gradients: int
    buckets: int
    activations: int
    temporaries: int
    peak: int
    peak_moment: str
    at_peak: Mapping[str, int]
    timeline: tuple[Sample, ...] = field(repr=False)
    sent: int = 0

    def to_json(self) -> dict[str, Any]:
        """All but the timeline, in plain types."""
        return {
            **{category: getattr(self, category) for category in CATEGORIES},
            "peak": self.peak,
            "peak_moment": self.peak_moment,
            "at_peak": dict(self.at_peak),
            "sent": self.sent,
        }


@dataclass(frozen=True)
class MemoryPlan:
    """A plan: one row for each optimizer.

    Attributes:
        model: The model's name.
        settings: The settings.
        optimizers: The rows, in the order of the settings.
        unavailable: Why a row that was asked for is not there (a missing package, by name), by optimizer.
    """

    model: str
    settings: PlanSettings
    optimizers: Mapping[OptimizerName, OptimizerPlan]
    unavailable: Mapping[OptimizerName, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the plan in plain types: ``{"model": …, "settings": …, "optimizers": {"flora": {"peak": …}}}``."""
        return {
            "model": self.model,
            "settings": {**asdict(self.settings), "optimizers": list(self.settings.optimizers)},
            "optimizers": {name: row.to_json() for name, row in self.optimizers.items()},
            "unavailable": dict(self.unavailable),
        }
