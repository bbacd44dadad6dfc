"""The options of the command line, each said once."""

from pathlib import Path
from typing import Annotated

import typer

from floragrad.train.config import CHOICES
from floragrad.train.presets import LEARNING_RATES, PRESETS

WHAT, OPTIMIZER, ACCUMULATION = "Model and text", "Optimizer", "Gradient accumulation"
TRAINING, OUTPUT, PROCESSES = "Training", "Folder and machine", "Several processes, started by torchrun"


def _whole_number(value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise typer.BadParameter(f"{value!r} is not a whole number") from error


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise typer.BadParameter(f"{value!r} is not a number") from error


def _choices(name: str) -> str:
    return "|".join(CHOICES[name])


_RATES = ", ".join(f"{name} {rates.lr:g}" for name, rates in LEARNING_RATES.items())
_RATIOS = ", ".join(f"{name} {rates.embedding_lr / rates.lr:g}" for name, rates in LEARNING_RATES.items())

Model = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="|".join(PRESETS) + "|NAME|FOLDER",
        help="A Llama by size, or any causal language model of Hugging Face by name or folder, with its "
        "weights where it has some. 60m to 1b are the sizes of the GaLore paper.",
        show_default="tiny",
    ),
]
TextFiles = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="FILE|FOLDER|PATTERN",
        help="Text to train on, UTF-8; may be given several times. Of a folder, everything below it.",
        show_default="the Python source of the standard library on this machine",
    ),
]
DatasetName = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="NAME",
        help="A dataset of the Hugging Face hub, or a folder with its files, instead of --text.",
        show_default=False,
    ),
]
DatasetConfig = Annotated[
    str | None,
    typer.Option(rich_help_panel=WHAT, metavar="NAME", help="Which configuration of the dataset.", show_default=False),
]
DatasetSplit = Annotated[
    str | None,
    typer.Option(rich_help_panel=WHAT, metavar="NAME", help="Which split of the dataset.", show_default="train"),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar="NAME",
        help="Which column of the dataset holds the text.",
        show_default="text",
    ),
]
MaxMegabytes = Annotated[
    float | None,
    typer.Option(
        parser=_number,
        metavar="NUMBER",
        rich_help_panel=WHAT,
        help="Read at most so much text.",
        show_default="4 for tiny on the standard library, 200 of a dataset, else everything",
    ),
]
VocabSize = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=WHAT,
        help="Entries of the tokenizer that is trained on the text. A model of Hugging Face brings its own.",
        show_default="2048 for tiny, 8192 for small, 32000 above",
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=WHAT,
        help="Tokens of a block.",
        show_default="128 for tiny, else 256",
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar=_choices("backend"),
        help="The framework: PyTorch with transformers' Trainer, or JAX with flax, optax and orbax.",
        show_default="torch",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=WHAT,
        metavar=_choices("dtype"),
        help="Of the weights and the computation.",
        show_default="float32",
    ),
]

OptimizerName = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=OPTIMIZER,
        metavar=_choices("optimizer"),
        help="What trains: Flora, torch's AdamW, or Hugging Face's Adafactor with momentum.",
        show_default="flora",
    ),
]
Optimizers = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=OPTIMIZER,
        metavar="NAME,NAME,…",
        help="What to compare, in this order.",
        show_default=",".join(LEARNING_RATES),
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        parser=_number,
        metavar="NUMBER",
        rich_help_panel=OPTIMIZER,
        help="Peak learning rate of the hidden matrices and the vectors.",
        show_default=f"{_RATES}; 5e-5 for a model of Hugging Face",
    ),
]
EmbeddingLearningRate = Annotated[
    float | None,
    typer.Option(
        "--embedding-lr",
        parser=_number,
        metavar="NUMBER",
        rich_help_panel=OPTIMIZER,
        help="Peak learning rate of the embedding and the output head, which want a larger one.",
        show_default=f"--lr times so much: {_RATIOS}; 1 for a model of Hugging Face",
    ),
]
LearningRateGrid = Annotated[
    str | None,
    typer.Option(
        "--lrs",
        rich_help_panel=OPTIMIZER,
        metavar="LR,LR,…",
        help="Learning rates to try with each optimizer, on the first seed.",
        show_default="each optimizer's own default",
    ),
]
EmbeddingLearningRateGrid = Annotated[
    str | None,
    typer.Option(
        "--embedding-lrs",
        rich_help_panel=OPTIMIZER,
        metavar="LR,LR,…",
        help="Learning rates of the embedding and the output head to try, each with each of --lrs.",
        show_default="the same multiple of --lrs as in floragrad train",
    ),
]
WeightDecay = Annotated[
    float | None,
    typer.Option(
        parser=_number,
        metavar="NUMBER",
        rich_help_panel=OPTIMIZER,
        help="Decoupled, on everything but vectors.",
        show_default="0",
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=OPTIMIZER,
        help="Flora: the momentum of an m x n matrix is kept as a sketch of about RANK x max(m, n) numbers.",
        show_default="a quarter of the hidden size; 128 for a model of Hugging Face",
    ),
]
Kappa = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=OPTIMIZER,
        help="Flora: steps until the projection is drawn anew.",
        show_default="1000; 100 for adaptive",
    ),
]
Projection = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=OPTIMIZER,
        metavar=_choices("projection"),
        help="Flora: random signs, weights that are learnt, or the paper's Gaussian.",
        show_default="sign",
    ),
]
StateDtype = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=OPTIMIZER,
        metavar=_choices("state_dtype"),
        help="Flora: how the sketch is stored.",
        show_default="int8",
    ),
]

Steps = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=TRAINING,
        help="Optimizer steps.",
        show_default=", ".join(f"{preset.steps} for {name}" for name, preset in PRESETS.items()) + ", else 1000",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=TRAINING,
        help="Blocks at once, in all processes together.",
        show_default="8 for tiny, 16 for small, 32 above, else 8",
    ),
]
Accumulate = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=ACCUMULATION,
        help="Micro-batches of --batch-size blocks whose gradients make one step.",
        show_default="1",
    ),
]
Accumulator = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=ACCUMULATION,
        metavar=_choices("accumulator"),
        help="How the gradients of --accumulate micro-batches are gathered: as sketches, each freed at once; "
        "exactly, which keeps them all; or not at all, so that one micro-batch makes a step.",
        show_default="flora with --optimizer flora, else exact",
    ),
]
Accumulators = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=ACCUMULATION,
        metavar="NAME,NAME,…",
        help="Ways to gather gradients (see floragrad train --accumulator), each with each of --optimizers.",
        show_default="each optimizer's own default",
    ),
]
AccumulatorRatio = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=ACCUMULATION,
        help="Sketched gradients: columns of a hidden matrix that share one number; 1 keeps them all.",
        show_default="1",
    ),
]
AccumulatorDtype = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=ACCUMULATION,
        metavar=_choices("accumulator_dtype"),
        help="Sketched gradients: how they are stored.",
        show_default="int4",
    ),
]
AccumulatorProjection = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=ACCUMULATION,
        metavar=_choices("accumulator_projection"),
        help="Sketched gradients: random signs, or the paper's Gaussian.",
        show_default="sign",
    ),
]
Release = Annotated[
    bool | None,
    typer.Option(
        "--release/--no-release",
        rich_help_panel=ACCUMULATION,
        help="Sketched gradients with Flora: decode, update and free one tensor at a time, or leave all of them in "
        ".grad before the step.",
        show_default="release",
    ),
]
WarmupSteps = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=TRAINING,
        help="Steps until the learning rate has risen to its peak; a cosine takes it to 0 from there.",
        show_default="a tenth of --steps",
    ),
]
MaxGradNorm = Annotated[
    float | None,
    typer.Option(
        parser=_number,
        metavar="NUMBER",
        rich_help_panel=TRAINING,
        help="Clip the gradient's global norm to this; 0: never.",
        show_default="1",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=TRAINING,
        help="Of the weights, the order of the text, and Flora.",
        show_default="0",
    ),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=TRAINING,
        metavar="SEED,SEED,…",
        help="Seeds to run each optimizer's best setting with.",
        show_default="0",
    ),
]
EvalEvery = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=TRAINING,
        help="Steps between two looks at the validation loss; there is one at the start and one at the end.",
        show_default="a tenth of --steps, at most 1000",
    ),
]
EvalBlocks = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=TRAINING,
        help="Held-out blocks to validate with, at most; drawn from all held-out documents.",
        show_default="128",
    ),
]

Out = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=OUTPUT,
        metavar="FOLDER",
        help="A new folder for everything that the run writes.",
        show_default="runs/<model>-<optimizer>-<time>",
    ),
]
CompareOut = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=OUTPUT,
        metavar="FOLDER",
        help="A new folder for everything that the comparison writes.",
        show_default="runs/compare-<model>-<time>",
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=OUTPUT,
        metavar="FOLDER",
        help="Continue what stopped in this folder, with its own options: give no others.",
        show_default=False,
    ),
]
SaveEvery = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=OUTPUT,
        help="Steps between two checkpoints; only the newest is kept.",
        show_default="a quarter of --steps, at most 1000",
    ),
]
KeepCheckpoint = Annotated[
    bool | None,
    typer.Option(
        "--keep-checkpoint/--no-keep-checkpoint",
        rich_help_panel=OUTPUT,
        help="Keep the trained model when the run is finished.",
        show_default="keep",
    ),
]
Fsdp = Annotated[
    bool | None,
    typer.Option(
        "--fsdp/--no-fsdp",
        rich_help_panel=PROCESSES,
        help="Each process keeps a part of every weight, gradient and state (FSDP2), instead of all of them.",
        show_default="no-fsdp",
    ),
]
Timeout = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="SECONDS",
        rich_help_panel=PROCESSES,
        help="Give up when another process does not answer for so long.",
        show_default="600",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        parser=_whole_number,
        metavar="INTEGER",
        rich_help_panel=OUTPUT,
        help="Threads to compute with, in each process.",
        show_default="OMP_NUM_THREADS, else the cores there are, at most 8",
    ),
]
