"""The commands of ``floragrad``: each takes its options, and calls what does the work.

What trains is imported inside the commands, so that ``--help`` and errors in options need no framework.
"""

import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from floragrad._version import __version__
from floragrad.train import environment
from floragrad.train.config import OPTIONS, OUTPUT, RunConfig
from floragrad.train.errors import UserError
from floragrad.train.grid import Grid, comparison_options
from floragrad.train.options import command, option, option_name, options_of, take
from floragrad.train.presets import PRESETS
from floragrad.train.processes import Processes, is_spokesman, join, started

if TYPE_CHECKING:
    from floragrad.train.folder import RunFolder

TRAIN_HELP = (
    "Train a causal language model, with Flora unless you say otherwise.\n\n"
    "Says first what the optimizer keeps and last what came out. Writes a folder with the configuration, the "
    "metrics (JSON lines), the newest checkpoint, the tokenizer, a summary, and the loss as a picture. "
    "Ctrl-C saves, and **--resume** continues as if nothing had happened, bit for bit."
)
TRAIN_EXAMPLES = (
    "**floragrad train** trains a tiny Llama on Python's source, in about two minutes on two cores.\n\n"
    "**floragrad train --optimizer adamw** is the same run without Flora.\n\n"
    "**floragrad train --text books/ --model small --steps 5000** reads everything below a folder.\n\n"
    "**floragrad train --model 60m --dataset Salesforce/wikitext --dataset-config wikitext-2-raw-v1** "
    "streams a dataset.\n\n"
    "**floragrad train --resume runs/tiny-flora-20260131T120000Z** continues a run.\n\n"
    "**torchrun --nproc-per-node 2 -m floragrad train** divides every batch over two processes."
)
COMPARE_HELP = (
    "Do the same training run with several optimizers, one after another.\n\n"
    "Everything but the optimizer is the same: weights, batches, schedule, parameter groups. With several "
    "learning rates each optimizer tries them all on the first seed, and its best goes on to the others. "
    "Writes one table (table.md, table.json) and one picture (comparison.png), with the runs beside them. "
    "Ctrl-C saves, and **--resume** continues; runs that are finished are not done again."
)
COMPARE_EXAMPLES = (
    "**floragrad compare** runs Flora, AdamW and Adafactor on the default job.\n\n"
    "**floragrad compare --lrs 1e-3,2e-3,4e-3 --embedding-lrs 5e-3,1e-2 --seeds 0,1,2** is a fair fight.\n\n"
    "**floragrad compare --optimizers flora,adamw --model small --text books/** is another job.\n\n"
    "**floragrad compare --resume runs/compare-tiny-20260131T120000Z** continues a comparison."
)

app = typer.Typer(
    help="Train language models with an optimizer whose memory grows sublinearly with the model.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"floragrad {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _floragrad(
    context: typer.Context,
    _version: bool = typer.Option(False, "--version", callback=_say_version, is_eager=True, help="Say the version."),
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@dataclass(frozen=True)
class Place:
    """Where a run or a comparison is kept."""

    out: Path | None = option(
        "A new folder for everything that is written.",
        OUTPUT,
        default=None,
        shown="runs/<model>-<optimizer>-<time>; runs/compare-<model>-<time>",
        metavar="FOLDER",
    )
    resume: Path | None = option(
        "Continue what stopped in this folder, with its own options: give no others.",
        OUTPUT,
        default=None,
        metavar="FOLDER",
    )


TRAIN_OPTIONS = {**OPTIONS, **options_of(Place)}
COMPARE_OPTIONS = comparison_options(TRAIN_OPTIONS)


@command(app, TRAIN_OPTIONS, help=TRAIN_HELP, epilog=TRAIN_EXAMPLES)
def train(given: dict[str, Any]) -> None:
    """Train, or continue what stopped."""
    place, launch = take(Place, given), {name: given.get(name) for name in ("fsdp", "timeout")}
    _check_started(**launch)
    if place.resume is not None:
        _only(given, "resume", *launch)
        _continue_training(place.resume, **launch)
        return
    config = RunConfig.resolve(**_fields(given))
    environment.prepare(config.backend, hub=config.uses_hub, several=config.backend == "torch")
    from floragrad.train.run import begin

    processes = join(config)
    with processes.together():
        folder = processes.share(
            lambda: begin(config, place.out or _new_name(f"{Path(config.model).name}-{config.optimizer}"))
        )
    _train(folder, processes)


@command(app, COMPARE_OPTIONS, help=COMPARE_HELP, epilog=COMPARE_EXAMPLES)
def compare(given: dict[str, Any]) -> None:
    """Compare, or continue what stopped."""
    place, fields = take(Place, given), _fields(given)
    if place.resume is not None:
        _only(given, "resume")
    hub = place.resume is None and RunConfig.resolve(**{**fields, "optimizer": "flora"}).uses_hub
    environment.prepare("torch", hub=hub)
    from floragrad.train import compare as comparison

    if place.resume is not None:
        comparison.compare(place.resume, Console())
        return
    plan = comparison.Plan(
        **{name: given[name] for name in options_of(Grid) if name in given},
        options={"keep_checkpoint": False, "threads": environment.default_threads(), **fields},
        command=shlex.join(["floragrad", *sys.argv[1:]]),
    )
    out = place.out or _new_name(f"compare-{Path(fields.get('model', 'tiny')).name}")
    comparison.begin(plan, out)
    comparison.compare(out, Console())


def _continue_training(path: Path, fsdp: bool | None, timeout: int | None) -> None:
    from floragrad.train.folder import RunFolder

    folder = RunFolder.open(path)
    summary = folder.summary()
    if summary is not None:
        from floragrad.train.display import Display

        if started() == 1:  # a kill after the summary leaves behind what is not kept
            folder.tidy(checkpoints=folder.config.keep_checkpoint)
        Display(Console(quiet=not is_spokesman())).summary(summary, str(path))
        return
    config = folder.config.launched(fsdp, timeout)
    several = config.backend == "torch"
    environment.prepare(config.backend, hub=config.uses_hub and not folder.checkpoints(), several=several)
    _train(folder, join(config))


def _train(folder: "RunFolder", processes: Processes) -> None:
    from floragrad.train.display import Display
    from floragrad.train.run import train

    display = Display(Console(quiet=not processes.leads))
    with processes.together(folder.path):
        display.summary(train(folder, display, processes), str(folder.path))


def _check_started(fsdp: bool | None, timeout: int | None) -> None:
    """Refuse what several processes do in one."""
    purposes = {"--fsdp": "divides the model over", "--timeout": "is how long to wait for one of"}
    for (name, purpose), given in zip(purposes.items(), (fsdp, timeout), strict=True):
        if given and started() == 1:
            raise UserError(
                f"{name} {purpose} several processes, and this is one: start them with torchrun --nproc-per-node 2 "
                f"-m floragrad train {name}, or leave it out"
            )


def _only(given: dict[str, Any], *allowed: str) -> None:
    """Refuse options beside ``--resume``."""
    others = [option_name(name) for name in given if name not in allowed]
    if others:
        raise UserError(
            f"--resume continues with the options that were given then, not {', '.join(others)}: give it alone"
        )


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are fields of a configuration; a model's folder by its whole path."""
    fields = {name: value for name, value in given.items() if name in OPTIONS}
    if "model" in fields and fields["model"] not in PRESETS and Path(fields["model"]).is_dir():
        fields["model"] = str(Path(fields["model"]).resolve())
    return fields


def _new_name(name: str) -> Path:
    """A folder below ``runs`` that is not there yet, and that no other process prepares."""
    stem = f"{name}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    candidates = (Path("runs", stem if number == 1 else f"{stem}-{number}") for number in range(1, 1000))
    return next(path for path in candidates if not path.exists() and not any(path.parent.glob(f".{path.name}.*")))
