"""The options of ``floragrad plan``, each said once."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from floragrad.planning.presets import MODELS
from floragrad.planning.result import OPTIMIZERS, Dtype
from floragrad.planning.sizes import Size, parse_size
from floragrad.policy import StateDtype

STEP, COMPARED, DEVICE, OUTPUT = "Training step", "Optimizers", "Devices", "Output"


def _count(value: str) -> int:
    text = str(value)  # typer puts the defaults through it too
    count = int(text) if text.isdecimal() else 0
    if count < 1:
        raise typer.BadParameter(f"{value!r} is not a whole number of at least 1")
    return count


def _size(value: str) -> Size:
    try:
        return parse_size(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=f"A preset ({', '.join(MODELS)}), the name of a model on the Hugging Face hub, a folder with a "
        "config.json, or a configuration file. No weights are read.",
        show_default=False,
    ),
]
Batch = Annotated[
    int,
    typer.Option(
        parser=_count,
        metavar="INTEGER",
        rich_help_panel=STEP,
        help="Sequences or images of a micro-batch, on each device.",
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        parser=_count,
        metavar="INTEGER",
        rich_help_panel=STEP,
        help="Tokens of a sequence.",
        show_default="1024, or what the model reads where that is less",
    ),
]
WeightsDtype = Annotated[
    str,
    typer.Option(
        "--dtype", rich_help_panel=STEP, metavar="|".join(get_args(Dtype)), help="Of the weights and the computation."
    ),
]
Accumulate = Annotated[
    int,
    typer.Option(
        parser=_count, metavar="INTEGER", rich_help_panel=STEP, help="Micro-batches whose gradients make a step."
    ),
]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", rich_help_panel=STEP, help="Recompute activations block by block.")
]
Optimizers = Annotated[
    str,
    typer.Option(
        rich_help_panel=COMPARED,
        metavar="NAME,NAME,…",
        help=f"What to compare: {', '.join(OPTIMIZERS)}.",
        show_default="all",
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        parser=_count,
        metavar="INTEGER",
        rich_help_panel=COMPARED,
        help="Of Flora, GaLore and LoRA.",
        show_default="128, or a quarter of the hidden size where that is less",
    ),
]
Ratio = Annotated[
    int | None,
    typer.Option(
        parser=_count,
        metavar="INTEGER",
        rich_help_panel=COMPARED,
        help="Flora: columns that share one number of the momentum, the same for every tensor, instead of --rank.",
        show_default=False,
    ),
]
MomentumDtype = Annotated[
    str,
    typer.Option(
        "--state-dtype",
        rich_help_panel=COMPARED,
        metavar="|".join(get_args(StateDtype)),
        help="Flora: how the momentum is stored.",
    ),
]
Ddp = Annotated[
    int,
    typer.Option(
        parser=_count, metavar="INTEGER", rich_help_panel=DEVICE, help="Devices that hold the whole model each."
    ),
]
Fsdp = Annotated[
    int,
    typer.Option(
        parser=_count, metavar="INTEGER", rich_help_panel=DEVICE, help="Devices that share the model (FSDP2)."
    ),
]
Fits = Annotated[
    Size | None,
    typer.Option(
        parser=_size,
        metavar="SIZE",
        rich_help_panel=DEVICE,
        help="Memory of a device, like 24GB or 80GiB: says what fits, and with how much to spare. The exit code is 1 "
        "where no optimizer does.",
        show_default=False,
    ),
]
Largest = Annotated[
    bool,
    typer.Option(
        "--largest",
        rich_help_panel=DEVICE,
        help="Of what fits: the largest batch, sequence and rank that still do. Takes some plans more.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print one JSON object, bytes as integers, and no table.")
]
Picture = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=OUTPUT,
        metavar="FILE",
        help="Draw live bytes over one step, a panel for each optimizer: a .png, .jpg, .pdf or .svg.",
        show_default=False,
    ),
]
Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        rich_help_panel=OUTPUT,
        help="Also do the step for real on this machine, at a size that fits, and show predicted beside measured.",
    ),
]
