"""Experiments and rows of the paper's tables: names, sizes and learning rates."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from benchmarks import harness

MICRO_BATCHES: Final = 16
_PAPER: Final = ("scale_parameter=true",)
"""Of the optimizer in all rows but LoRA and ours."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One of the paper's tables, on one task.

    Attributes:
        name: ``"accumulation"`` or ``"momentum"``.
        task: Of ``floragrad train``.
        model: Name on the hub, or a folder; empty for a small one.
        methods: In the order of the rows.
        ranks: r of LoRA and Flora.
        batch: Examples of a micro-batch.
        examples: How many a row reads; 0 for ``epochs``.
        epochs: Passes over the examples there are.
        lr: Learning rate of rows that scale updates by the weights; of a search, the middle of the first three.
        lora_lr: That of LoRA.
        our_lr: That of our defaults.
        our_embedding_lr: That of the embedding with them.
        kappa: Steps between two projections of the momentum.
        kappas: More of them, for Flora with the largest r.
        width: Of a small model, if another than the preset's.
    """

    name: str
    task: str
    model: str = ""
    methods: tuple[str, ...] = ("None", "Naive", "LoRA", "Flora", "Flora, ours")
    ranks: tuple[int, ...] = (8, 32, 128, 256)
    batch: int
    examples: int = 0
    epochs: int = 1
    lr: float
    lora_lr: float
    our_lr: float
    our_embedding_lr: float
    kappa: int = 1000
    kappas: tuple[int, ...] = ()
    width: int = 0


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Names and sizes of everything.

    Attributes:
        experiments: In the order of the page.
        data: Options of the data of each task.
        reference: Width of the model that ranks are given for; 0 for that of each model.
        seeds: By default.
        width: Of small models.
        layers: Of theirs, on each side.
        vocabulary: Of their tokenizer.
        pretraining: Options of their pre-training.
        warmup: Part of the steps in which learning rates rise; they are constant after it.
        scored: Held-out examples to score.
        search: Whether to search the rows' learning rates, from the given ones, or to use these.
        jobs: Runs at once by default; 0 does them in this process.
    """

    experiments: tuple[Experiment, ...]
    data: Mapping[str, Mapping[str, Any]]
    reference: int = 0
    seeds: tuple[int, ...] = (42, 43, 44)
    width: int = 128
    layers: int = 2
    vocabulary: int = 1024
    pretraining: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0
    scored: int = 512
    search: bool = False
    jobs: int = 1


_PROMPTS: Final[dict[str, dict[str, Any]]] = {
    "summarization": {"source_prefix": "summarize: "},
    "seq2seq": {"source_prefix": "translate German to English: ", "source_suffix": " English: "},
}


def _data(**options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {task: {**_PROMPTS[task], **chosen} for task, chosen in options.items()}


_ACCUMULATION: Final[dict[str, Any]] = {
    "name": "accumulation",
    "lr": 4e-4,
    "lora_lr": 1e-3,
    "our_lr": 4e-5,
    "our_embedding_lr": 4e-5,
    "batch": 1,
}
_MOMENTUM: Final[dict[str, Any]] = {
    "name": "momentum",
    "ranks": (32, 256),
    "lr": 1e-3,
    "lora_lr": 3e-3,
    "our_lr": 1e-4,
    "our_embedding_lr": 1e-4,
    "batch": 4,
    "epochs": 10,
}
PAPER: Final = Preset(
    experiments=(
        Experiment(task="summarization", model="google-t5/t5-3b", **_ACCUMULATION),
        Experiment(task="seq2seq", model="openai-community/gpt2", **_ACCUMULATION),
        Experiment(task="summarization", model="google-t5/t5-small", **_MOMENTUM),
        Experiment(task="seq2seq", model="openai-community/gpt2", **_MOMENTUM),
    ),
    data=_data(
        summarization={
            "dataset": "EdinburghNLP/xsum",
            "sequence_length": 512,
            "target_length": 128,
            "max_megabytes": 10_000,
        },
        seq2seq={
            "dataset": "IWSLT/iwslt2017",
            "dataset_config": "iwslt2017-de-en",
            "sequence_length": 512,
            "target_length": 512,
            "max_megabytes": 10_000,
        },
    ),
)
_SMALL_ACCUMULATION: Final[dict[str, Any]] = {
    "name": "accumulation",
    "lr": 1e-2,
    "lora_lr": 2e-3,
    "our_lr": 1e-3,
    "our_embedding_lr": 1e-2,
    "batch": 4,
    "examples": 60 * 64,
}
_SMALL_MOMENTUM: Final[dict[str, Any]] = {
    "name": "momentum",
    "ranks": (32, 256),
    "lr": 3e-2,
    "lora_lr": 2e-3,
    "our_lr": 1e-3,
    "our_embedding_lr": 1e-2,
    "batch": 16,
    "examples": 400 * 16,
    "kappa": 100,
}
_SIZES: Final = {**_SMALL_MOMENTUM, "methods": ("None", "Naive", "Flora")}
SMALL: Final = Preset(
    experiments=(
        Experiment(task="summarization", **_SMALL_ACCUMULATION),
        Experiment(task="seq2seq", **_SMALL_ACCUMULATION),
        Experiment(task="summarization", **_SMALL_MOMENTUM, kappas=(1, 10, 1000)),
        Experiment(task="seq2seq", **{**_SMALL_MOMENTUM, "batch": 32, "examples": 500 * 32}),
        Experiment(task="summarization", **_SIZES, width=64),
        Experiment(task="summarization", **_SIZES, width=256),
    ),
    data=_data(
        summarization={"sequence_length": 64, "target_length": 16, "max_megabytes": 4},
        seq2seq={"sequence_length": 40, "target_length": 16, "max_megabytes": 4},
    ),
    reference=512,
    seeds=(0, 1, 2),
    pretraining={"steps": 600, "batch_size": 16, "lr": 2e-3},
    warmup=0.1,
    scored=256,
    search=True,
    jobs=harness.cores(),
)
SMOKE: Final = replace(
    SMALL,
    experiments=(
        Experiment(task="summarization", **{**_SMALL_ACCUMULATION, "examples": 2 * 64, "ranks": (256,)}),
        Experiment(task="seq2seq", **{**_SMALL_MOMENTUM, "examples": 4 * 16, "ranks": (256,)}),
    ),
    data={task: {**options, "max_megabytes": 0.5} for task, options in SMALL.data.items()},
    seeds=(0,),
    pretraining={"steps": 10, "batch_size": 16, "lr": 2e-3},
    scored=32,
    search=False,
    jobs=0,
)
PRESETS: Final = {"small": SMALL, "paper": PAPER, "smoke": SMOKE}


class Row(NamedTuple):
    """A row of a table: its name and its options of ``floragrad train``."""

    name: str
    options: dict[str, Any]

    @property
    def method(self) -> str:
        """The name without r and κ."""
        return method(self.name)


def method(name: str) -> str:
    """Return a row's name without r and κ."""
    return name.partition("(")[0]


def rows(experiment: Experiment, preset: Preset, width: int) -> list[Row]:
    """Return the rows of a table.

    Args:
        experiment: The table.
        preset: It belongs to.
        width: Hidden size of the model.
    """
    base = {"set": _PAPER, "lr": experiment.lr}
    lora = {"lr": experiment.lora_lr}
    ours = {"lr": experiment.our_lr, "embedding_lr": experiment.our_embedding_lr}
    ranks = {r: r * width // (preset.reference or width) for r in experiment.ranks}
    if experiment.name == "momentum":
        flora = {
            "optimizer": "flora",
            "projection": "gaussian",
            "state_dtype": "float32",
            "kappa": experiment.kappa,
            "lr": experiment.lr,
            "set": (*_PAPER, "residual=false", "embedding_momentum=compressed"),
        }
        largest = max(ranks, default=0)
        made = [
            Row("None", {**base, "optimizer": "flora-none"}),
            Row("Naive", {**base, "optimizer": "flora-full"}),
            *(Row(f"LoRA({r})", {**lora, "optimizer": "lora-adafactor", "rank": rank}) for r, rank in ranks.items()),
            *(Row(f"Flora({r})", {**flora, "rank": rank}) for r, rank in ranks.items()),
            *(
                Row(f"Flora({largest}), κ = {kappa}", {**flora, "rank": ranks[largest], "kappa": kappa})
                for kappa in experiment.kappas
            ),
            Row("Flora, ours", {**ours, "optimizer": "flora", "rank": width // 4}),
        ]
    else:
        exact = {"accumulate": MICRO_BATCHES, "accumulator": "exact"}
        adapters = {**lora, **exact, "optimizer": "lora-adafactor-none"}
        whole = {**base, "optimizer": "flora-none"}
        sketches = {
            "accumulate": MICRO_BATCHES,
            "accumulator": "flora",
            "accumulator_projection": "gaussian",
            "accumulator_dtype": "float32",
        }
        made = [
            Row("None", whole),
            Row("Naive", {**whole, **exact}),
            *(Row(f"LoRA({r})", {**adapters, "rank": rank}) for r, rank in ranks.items()),
            *(Row(f"Flora({r})", {**whole, **sketches, "accumulator_ratio": width // k}) for r, k in ranks.items()),
            Row("Flora, ours", {**ours, "optimizer": "flora-none", "accumulate": MICRO_BATCHES}),
        ]
    return [row for row in made if row.method in experiment.methods]
