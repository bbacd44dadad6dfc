"""What a plan is asked for and what it answers: plain data, no framework.

Bytes are integers; every category is counted at the storages that hold it, each storage once.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, get_args

from floragrad.policy import StateDtype

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
"""What bytes are held for, from what lives longest to what lives shortest."""

LASTING: Final = ("parameters", "optimizer_state", "accumulation")
"""The categories that stay from step to step."""

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of the whole that is done, 0 to 1."""


@dataclass(frozen=True)
class PlanSettings:
    """The training step that is planned.

    Attributes:
        batch: Sequences (images) in a micro-batch, on each device.
        sequence: Tokens of a sequence; an image model has its own.
        dtype: Of the weights, and so of gradients and activations: ``"float32"`` or ``"bfloat16"``.
        optimizers: The rows to compare; see :data:`OPTIMIZERS`.
        rank: r of Flora, GaLore and LoRA.
        ratio: ρ of Flora instead of ``rank``, the same for every tensor.
        state_dtype: Storage of Flora's momentum.
        accumulate: Micro-batches of one update.
        checkpointing: Whether activations are recomputed block by block.
        ddp: Devices that hold the whole model each (DistributedDataParallel).
        fsdp: Devices that share the model (FSDP2, one unit for each block).

    Raises:
        ValueError: Naming the setting, its value and what is allowed.

    Example:
        >>> PlanSettings(batch=4, accumulate=16).accumulate
        16
    """

    batch: int = 1
    sequence: int = 1024
    dtype: Dtype = "float32"
    optimizers: tuple[OptimizerName, ...] = OPTIMIZERS
    rank: int = 128
    ratio: int | None = None
    state_dtype: StateDtype = "int8"
    accumulate: int = 1
    checkpointing: bool = False
    ddp: int = 1
    fsdp: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "sequence", "rank", "accumulate", "ddp", "fsdp"):
            _check_count(name, getattr(self, name))
        if self.ratio is not None:
            _check_count("ratio", self.ratio)
        _check_choice("dtype", self.dtype, get_args(Dtype))
        _check_choice("state_dtype", self.state_dtype, get_args(StateDtype))
        if not self.optimizers:
            raise ValueError(f"optimizers is empty: choose from {', '.join(OPTIMIZERS)}")
        for optimizer in self.optimizers:
            _check_choice("optimizers", optimizer, OPTIMIZERS)
        if self.ddp > 1 and self.fsdp > 1:
            raise ValueError(f"ddp={self.ddp} and fsdp={self.fsdp}: give one of them; what of the other is left out")


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
    """One row of a plan: what one optimizer's training step holds on one device.

    ``parameters``, ``optimizer_state`` and ``accumulation`` stay from step to step. Of the others it is the most
    that is held at once in a step; these need not fall together, so that the peak is at most the sum of all.

    Attributes:
        parameters: Bytes of all weights, frozen ones and a model's buffers too.
        optimizer_state: Of what the optimizer keeps between steps.
        accumulation: Of what :class:`floragrad.GradientAccumulator` keeps of gradients.
        gradients: Of gradients, at most.
        buckets: Of communication: DDP's buckets, FSDP2's gathered weights and gradients.
        activations: Of what forward and backward passes make, at most; the batch and the logits too.
        temporaries: Of what an update or a fold makes and frees again, at most.
        peak: The most bytes that live at once, all categories together.
        peak_moment: When that is.
        at_peak: Bytes of each category then.
        timeline: A step in the steady state: the highest sample of every moment, in order.
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

    def to_json(self) -> dict[str, Any]:
        """All but the timeline, in plain types."""
        return {
            **{category: getattr(self, category) for category in CATEGORIES},
            "peak": self.peak,
            "peak_moment": self.peak_moment,
            "at_peak": dict(self.at_peak),
        }


@dataclass(frozen=True)
class MemoryPlan:
    """A plan: one row for each optimizer.

    Attributes:
        model: The model's name.
        settings: What was asked for.
        optimizers: The rows, in the order of the settings.
        unavailable: Why a row that was asked for is not there (a missing package, by name), by optimizer.
    """

    model: str
    settings: PlanSettings
    optimizers: Mapping[OptimizerName, OptimizerPlan]
    unavailable: Mapping[OptimizerName, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The plan in plain types: ``{"model": …, "settings": …, "optimizers": {"flora": {"peak": …}}}``."""
        return {
            "model": self.model,
            "settings": {**asdict(self.settings), "optimizers": list(self.settings.optimizers)},
            "optimizers": {name: row.to_json() for name, row in self.optimizers.items()},
            "unavailable": dict(self.unavailable),
        }


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: must be an integer >= 1")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
