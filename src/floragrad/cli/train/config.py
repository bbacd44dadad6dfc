"""Configuration of a run: every choice, resolved and checked before anything is read or written."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, get_args, get_type_hints

from floragrad.cli.disk import parse_object
from floragrad.cli.errors import UserError
from floragrad.cli.machine import default_threads
from floragrad.cli.methods import EMBEDDING_LR, METHODS
from floragrad.cli.options import check_values, kinds, needing, option, option_name, options_of
from floragrad.cli.presets import PAIR_TASKS, PRESETS, TASKS, job_name
from floragrad.cli.train import defaults
from floragrad.cli.train.checks import check_conflicts, check_sharding, check_together, read_settings, setting_value
from floragrad.policy import Projection, StateDtype

MODEL, OPTIMIZER, ACCUMULATION = "Model and text", "Optimizer", "Gradient accumulation"
TRAINING, OUTPUT, PROCESSES = "Training", "Folder and machine", "Several processes, started by torchrun"
_OTHER_RATES: Final = ", ".join(
    f"{name} {method.lr:g}" for name, method in METHODS.items() if method.lr != METHODS["flora"].lr
)
_STEPS: Final = ", ".join(f"{name}: {sizes['tiny'].steps}" for name, sizes in TASKS.items() if name != "lm")
_GATHERED: Final = {"flora": "sketched gradients", "exact": "exact gradients", "none": "no accumulation"}


def _column(help: str, **by_task: str) -> Any:
    """Declare a column of the dataset, with its default by task."""
    first, *others = by_task.items()
    shown = "; ".join([first[1], *(f"{task}: {name}" for task, name in others)])
    derive, requires = defaults.column(**by_task), {"task": tuple(by_task)}
    return option(help, MODEL, default=None, derive=derive, shown=shown, needs=("dataset",), requires=requires)


def _of_flora(help: str, keyword: str, default: Any, **more: Any) -> Any:
    """Declare an argument of Flora."""
    settings = {"shown": str(default), "derive": defaults.with_flora(keyword, default), "keyword": keyword}
    return option(help, OPTIMIZER, needs=("optimizer",), **{**settings, **more})


def _of_sketches(help: str, keyword: str, default: Any, **more: Any) -> Any:
    """Declare an argument of the accumulator."""
    derive = defaults.with_sketches(default)
    return option(
        help, ACCUMULATION, derive=derive, shown=str(default), needs=("accumulator",), keyword=keyword, **more
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. Make it with :meth:`resolve`, which fills in the defaults and checks every value.

    Every field but the last is an option of ``floragrad train``, and there is no other place where it is declared. A
    new one has a constant default, so that the runs of older versions can be continued. ``prepared`` is set by
    ``floragrad compare`` only: the folder, relative to the run's, whose text and tokenizer it reads.
    """

    task: str = option(
        "What is trained: a language model on text, a model that translates (seq2seq) or summarizes, or a small ViT "
        "that classifies images.",
        MODEL,
        default="lm",
        choices=tuple(TASKS),
    )
    model: str = option(
        "A Llama by size, or any causal language model of Hugging Face by name or folder, with its weights where it "
        "has some. 60m to 1b are the sizes of the GaLore paper. seq2seq and summarization: a small new T5 (tiny), or "
        "an encoder-decoder or causal language model of Hugging Face.",
        MODEL,
        default="tiny",
        metavar="|".join(PRESETS) + "|NAME|FOLDER",
    )
    optimizer: str = option(
        "What trains, by the names of the methods that floragrad compare knows.",
        OPTIMIZER,
        default="flora",
        choices=tuple(METHODS),
    )
    text: tuple[str, ...] = option(
        "Text to train on, UTF-8; may be given several times. Of a folder, everything below it.",
        MODEL,
        default=(),
        shown="the Python source of the standard library on this machine",
        metavar="FILE|FOLDER|PATTERN",
        requires={"task": ("lm",)},
    )
    validation_text: tuple[str, ...] = option(
        "Text to validate with; then all of the other is trained on. Read as --text is, and whole.",
        MODEL,
        default=(),
        shown="every tenth document of the other",
        metavar="FILE|FOLDER|PATTERN",
        requires={"task": ("lm",)},
    )
    dataset: str | None = option(
        "A dataset of the Hugging Face hub, or a folder with its files, instead of --text.", MODEL, default=None
    )
    dataset_config: str | None = option("Configuration of the dataset.", MODEL, default=None, needs=("dataset",))
    dataset_split: str | None = option(
        "Split of the dataset.", MODEL, derive=defaults.with_dataset("train"), shown="train", needs=("dataset",)
    )
    text_column: str | None = _column("Column of the dataset that holds the text.", lm="text")
    source_column: str | None = _column(
        "Column of the dataset that the model reads: texts (or a part of it: translation.de), or images.",
        **{"seq2seq": "translation.de", "summarization": "document", "vision": "image"},
    )
    target_column: str | None = _column(
        "Column of the dataset that the model predicts: texts, or classes, which are whole numbers from 0 on.",
        **{"seq2seq": "translation.en", "summarization": "summary", "vision": "label"},
    )
    source_prefix: str = option(
        "Text before each source, like 'summarize: '.", MODEL, default="", requires={"task": PAIR_TASKS}
    )
    source_suffix: str = option(
        "Text after each source, where the target of a causal language model begins, like ' English: '.",
        MODEL,
        default="",
        shown="a new line for causal language models",
        requires={"task": PAIR_TASKS},
    )
    max_megabytes: float | None = option(
        "Read at most so much text, or so many pixels.",
        MODEL,
        derive=defaults.max_megabytes,
        shown="4 for tiny on the data of Debian's packages or Python, 200 of a dataset, else everything",
        above=0,
        maximum=1e12,
    )
    vocab_size: int | None = option(
        "Entries of the tokenizer that is trained on the text. A model of Hugging Face brings its own.",
        MODEL,
        derive=defaults.of_preset("vocab_size", None),
        shown="2048 for tiny, 8192 for small, 32000 above; seq2seq: 1024, summarization: 2048",
        minimum=257,  # the 256 bytes and the end of a text
        requires={"task": ("lm", *PAIR_TASKS)},
    )
    sequence_length: int = option(
        "Tokens of a block, or of a source at most: --task summarization cuts longer ones, seq2seq leaves them out.",
        MODEL,
        derive=defaults.of_preset("sequence_length", 256),
        shown="128 for tiny, else 256; tiny of seq2seq: 24, summarization: 96",
        minimum=2,
        requires={"task": ("lm", *PAIR_TASKS)},
    )
    target_length: int | None = option(
        "Tokens of a target, at most.",
        MODEL,
        default=None,
        derive=defaults.target_length,
        shown="--sequence-length; summarization: a quarter of it",
        minimum=2,
        requires={"task": PAIR_TASKS},
    )
    batch_size: int = option(
        "Blocks at once, or pairs, or images, in all processes together.",
        TRAINING,
        derive=defaults.of_preset("batch_size", 8),
        shown="8 for tiny, 16 for small, 32 above, else 8; tiny of seq2seq and vision: 64, summarization: 16",
        minimum=1,
    )
    accumulate: int = option(
        "Micro-batches of --batch-size blocks whose gradients make one step.", ACCUMULATION, default=1, minimum=1
    )
    accumulator: str = option(
        "How the gradients of --accumulate micro-batches are gathered: as sketches, each freed at once; exactly, which "
        "keeps them all; or not at all, so that one micro-batch makes a step.",
        ACCUMULATION,
        derive=defaults.accumulator,
        shown="flora with --optimizer flora, else exact",
        choices=tuple(_GATHERED),
    )
    accumulator_ratio: int | None = _of_sketches(
        "Sketched gradients: columns of a hidden matrix that share one element; 1 keeps them all.",
        "ratio",
        1,
        minimum=1,
    )
    accumulator_dtype: str | None = _of_sketches(
        "Sketched gradients: how they are stored.", "state_dtype", "int4", choices=get_args(StateDtype)
    )
    accumulator_projection: str | None = _of_sketches(
        "Sketched gradients: random signs, or the paper's Gaussian.", "projection", "sign", choices=("sign", "gaussian")
    )
    release: bool | None = option(
        "Sketched gradients with Flora: decode, update and free one tensor at a time, or leave all of them in .grad "
        "before the step.",
        ACCUMULATION,
        derive=defaults.with_sketches(lambda given: defaults.is_flora(given) and given.get("backend") != "jax"),
        shown="release",
        negatable=True,
        needs=("optimizer", "accumulator"),
    )
    steps: int = option(
        "Optimizer steps.",
        TRAINING,
        derive=defaults.steps,
        shown=", ".join(f"{preset.steps} for {name}" for name, preset in PRESETS.items()) + f", else 1000; {_STEPS}",
        minimum=1,
    )
    lr: float = option(
        "Peak learning rate of the hidden matrices and the vectors.",
        OPTIMIZER,
        derive=defaults.lr,
        shown=f"{METHODS['flora'].lr:g}, but {_OTHER_RATES}; times 0.05 for a model of Hugging Face",
        above=0,
        maximum=1e37,  # its default multiple for the embedding is a float32 too
    )
    embedding_lr: float = option(
        "Peak learning rate of the embedding and the output head, which want a larger one.",
        OPTIMIZER,
        derive=defaults.embedding_lr,
        shown=f"{EMBEDDING_LR:g} at the default --lr, and in proportion to it; 5e-5 for a model of Hugging Face",
        above=0,
        maximum=1e38,
    )
    warmup_steps: int = option(
        "Steps until the learning rate has risen to its peak, from where --schedule takes it on.",
        TRAINING,
        derive=defaults.part_of_steps(10, least=0),
        shown="a tenth of --steps",
        minimum=0,
    )
    schedule: str = option(
        "Learning rate after the warm-up: along a cosine to 0, along a line to 0, or constant.",
        TRAINING,
        default="cosine",
        choices=("cosine", "linear", "constant"),
    )
    weight_decay: float = option(
        "Decoupled, on everything but vectors.", OPTIMIZER, default=0.0, minimum=0, maximum=1e38
    )
    max_grad_norm: float = option(
        "Clip the gradient's global norm to this; 0: never.",
        TRAINING,
        default=1.0,
        minimum=0,
        maximum=1e38,
    )
    rank: int | None = _of_flora(
        "Flora: the momentum of an m x n matrix is kept as a sketch of about RANK x max(m, n) elements. "
        "galore, apollo, lora: their rank.",
        "rank",
        defaults.rank,
        shown="a quarter of the hidden size; 128 for a model of Hugging Face",
        minimum=1,
    )
    kappa: int | None = _of_flora(
        "Flora: steps until the projection is drawn anew.",
        "kappa",
        lambda given: 100 if given.get("projection") == "adaptive" else 1000,
        shown="1000; 100 for adaptive",
        minimum=1,
    )
    projection: str | None = _of_flora(
        "Flora: random signs, weights that are learnt, or the paper's Gaussian.",
        "projection",
        "sign",
        choices=get_args(Projection),
    )
    state_dtype: str | None = _of_flora(
        "Flora: how the sketch is stored.", "state_dtype", "int8", choices=get_args(StateDtype)
    )
    set: tuple[str, ...] = option(
        "Flora: any other of its options, by its name in Python; may be given several times.",
        OPTIMIZER,
        default=(),
        metavar="NAME=VALUE",
        needs=("optimizer",),
    )
    vocabulary: str = option(
        "Who trains the embedding, the output head and the vectors: the method itself (own), or Flora with its default "
        "options and learning rates beside every method (shared).",
        OPTIMIZER,
        default="own",
        choices=("shared", "own"),
    )
    backend: str = option(
        "The framework: PyTorch with transformers' Trainer, or JAX with flax, optax and orbax.",
        MODEL,
        default="torch",
        choices=("torch", "jax"),
    )
    dtype: str = option(
        "Of the weights and the computation.", MODEL, default="float32", choices=("float32", "bfloat16")
    )
    gradient_checkpointing: bool = option(
        "Compute the activations of each layer again in the backward pass, instead of keeping them: less memory, more "
        "time.",
        TRAINING,
        default=False,
    )
    seed: int = option(
        "Of the weights, the order of the text, and Flora.", TRAINING, default=0, minimum=0, maximum=2**32 - 1
    )
    eval_every: int = option(
        "Steps between two looks at the validation loss; there is one at the start and one at the end.",
        TRAINING,
        derive=defaults.part_of_steps(10, least=1, most=1000),
        shown="a tenth of --steps, at most 1000",
        minimum=1,
    )
    eval_blocks: int = option(
        "Held-out blocks, or pairs, or images, to validate with, at most; drawn from all that are held out.",
        TRAINING,
        default=128,
        derive=defaults.of_task(128, 512),
        shown="128; the other tasks: 512",
        minimum=1,
    )
    generate_blocks: int = option(
        "Held-out pairs of those to generate a target for, at most, which BLEU or ROUGE is measured on.",
        TRAINING,
        default=128,
        minimum=1,
        requires={"task": PAIR_TASKS},
    )
    save_every: int = option(
        "Steps between two checkpoints; only the newest is kept.",
        OUTPUT,
        derive=defaults.part_of_steps(4, least=1, most=1000),
        shown="a quarter of --steps, at most 1000",
        minimum=1,
    )
    keep_checkpoint: bool = option(
        "Keep the trained model when the run is finished.", OUTPUT, default=True, negatable=True
    )
    threads: int = option(
        "Threads to compute with, in each process.",
        OUTPUT,
        derive=lambda _: default_threads(),
        shown="OMP_NUM_THREADS, else the cores there are, at most 8",
        minimum=1,
        maximum=4096,
    )
    fsdp: bool = option(
        "Each process keeps a part of every weight, gradient and state (FSDP2), instead of all of them.",
        PROCESSES,
        default=False,
        negatable=True,
    )
    report_to: tuple[str, ...] = option(
        "Report the metrics to this service too, named as transformers' Trainer names it; may be given several times.",
        OUTPUT,
        default=("none",),
        shown="none",
        metavar="tensorboard|wandb|NAME",
        requires={"backend": ("torch",)},
    )
    timeout: int = option(
        "Give up when another process does not answer for so long.",
        PROCESSES,
        default=600,
        minimum=1,
        maximum=10**7,
        metavar="SECONDS",
    )
    prepared: str | None = None

    @classmethod
    def resolve(cls, **given: Any) -> "RunConfig":
        """Resolve the user's values by field name; None, or nothing, means the default. Contradictions are refused."""
        given = {name: value for name, value in given.items() if value is not None and value != ()}
        settings = _settings(given)
        given |= {name: value for name, value in settings.items() if name in OPTIONS}
        check_values(OPTIONS, given)
        check_conflicts(given, OPTIONS)
        if given.get("fsdp"):
            check_sharding(*(given.get(name, OPTIONS[name].default) for name in ("backend", "optimizer", "vocabulary")))
        derived = {name: each.derive(given) for name, each in OPTIONS.items() if each.derive is not None}
        if "ratio" in settings:
            derived["rank"] = None  # the two say the same
        config = cls(**{**derived, **given})
        if settings:
            check_together(config.keywords("optimizer"))
        if config.warmup_steps >= config.steps:
            raise UserError(
                f"--warmup-steps {config.warmup_steps} leaves none of the {config.steps} steps for the full "
                f"learning rate: give at most {config.steps - 1}, or more --steps"
            )
        return config

    def launched(self, fsdp: bool | None, timeout: int | None) -> "RunConfig":
        """Return the same run, its processes started in another way; None leaves things as they were."""
        given: dict[str, Any] = {"fsdp": fsdp, "timeout": timeout}
        given = {name: value for name, value in given.items() if value is not None}
        check_values(OPTIONS, given)
        if fsdp:
            check_sharding(self.backend, self.optimizer, self.vocabulary)
        return replace(self, **given)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.batch_size * self.micro_batches * self.sequence_length

    @property
    def job(self) -> str:
        """Name of the model, and of the task where it is no language model."""
        return job_name(self.task, self.model)

    @property
    def unit(self) -> str:
        """Name of what a step reads so many of."""
        return "tokens" if self.task == "lm" else "examples"

    @property
    def units_per_step(self) -> int:
        """Tokens that one optimizer step reads; examples with other tasks than language models."""
        return self.tokens_per_step if self.task == "lm" else self.batch_size * self.micro_batches

    @property
    def micro_batches(self) -> int:
        """Micro-batches whose gradients make one optimizer step."""
        return 1 if self.accumulator == "none" else self.accumulate

    @property
    def label(self) -> str:
        """The method with its settings, and how gradients are gathered where that was asked for."""
        name = " ".join((self.optimizer, *self.set))
        if self.accumulate == 1:
            return name
        stored = f" ({self.accumulator_dtype})" if self.accumulator_dtype else ""
        return f"{name}, {_GATHERED[self.accumulator]}{stored}"

    @property
    def uses_hub(self) -> bool:
        """True where the Hugging Face hub may be asked for the model or the text."""
        names = (self.dataset, None if self.model in PRESETS else self.model)
        return any(name is not None and not Path(name).is_dir() for name in names)

    def keywords(self, needed: str) -> dict[str, Any]:
        """Return the arguments of Flora (``"optimizer"``) or of its accumulator (``"accumulator"``), seed included."""
        chosen = {each.keyword: getattr(self, each.name) for each in needing(OPTIONS, needed) if each.keyword}
        fixed = METHODS[self.optimizer].flora if needed == "optimizer" else None
        chosen = {name: value for name, value in chosen.items() if value is not None}
        settings = _values(self.set) if needed == "optimizer" else {}
        return {**(fixed or {}), **settings, **chosen, "seed": self.seed}

    def to_json(self) -> str:
        """Return the configuration as a JSON object, one field a line."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """Read the output of :meth:`to_json`; refuse other JSON, and values out of range."""
        try:
            values = parse_object(text)
            for name, declared in get_type_hints(cls).items():
                allowed, value = kinds(declared), values.get(name)
                if tuple in allowed and isinstance(value, list):
                    values[name] = tuple(value)
                elif name in values and type(value) not in allowed:  # True is no number
                    raise TypeError(f"{name} is {value!r}")
            config = cls(**values)
        except (ValueError, TypeError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise UserError(f"config.json is not a run's configuration ({error}); its fields are {names}") from error
        check_values(OPTIONS, vars(config))
        return config


OPTIONS: Final = options_of(RunConfig)


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``--set`` and their values; refuse several values, and options without effect."""
    method = METHODS.get(given.get("optimizer", "flora"))
    for name, values in read_settings(given.get("set", ())).items():
        if len(values) > 1:
            raise UserError(f"--set {name}={','.join(values)} has several values: give one, or use floragrad compare")
        if name in given:
            raise UserError(f"--set {name} and {option_name(name)} are both given: leave one out")
        if method is not None and method.is_flora and not method.takes(name):
            raise UserError(f"--set {name} has no effect with --optimizer {given['optimizer']}: leave it out")
        if name == "embedding_momentum" and given.get("vocabulary") == "shared":
            raise UserError("--set embedding_momentum changes the vocabulary's optimizer: add --vocabulary own")
    return _values(given.get("set", ()))


def _values(settings: Iterable[str]) -> dict[str, Any]:
    return {name: setting_value(value) for name, _, value in (text.partition("=") for text in settings)}
