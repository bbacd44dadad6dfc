"""``floragrad train``: options and entry point.

Frameworks are imported inside the functions, so that ``--help`` and errors in options need no framework.
"""

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from floragrad.cli import machine
from floragrad.cli.app import app
from floragrad.cli.errors import UserError
from floragrad.cli.machine import is_spokesman, started
from floragrad.cli.options import command, option, option_name, options_of, take
from floragrad.cli.presets import PRESETS
from floragrad.cli.train.config import OPTIONS, OUTPUT, RunConfig
from floragrad.cli.train.processes import Processes, join

if TYPE_CHECKING:
    from floragrad.cli.train.folder import RunFolder

HELP = (
    "Train a causal language model, or another of the tasks, with Flora unless you say otherwise.\n\n"
    "Says first what the optimizer keeps and last what came out. Writes a folder with the configuration, the "
    "metrics (JSON lines), the newest checkpoint, the tokenizer, a summary, and the loss as a picture. "
    "Ctrl-C saves, and **--resume** continues as if nothing had happened, bit for bit."
)
EXAMPLES = (
    "**floragrad train** trains a tiny Llama on Python's source, in about two minutes on two cores.\n\n"
    "**floragrad train --optimizer adamw** is the same run without Flora.\n\n"
    "**floragrad train --text books/ --model small --steps 5000** reads everything below a folder.\n\n"
    "**floragrad train --model 60m --dataset Salesforce/wikitext --dataset-config wikitext-2-raw-v1** "
    "streams a dataset.\n\n"
    "**floragrad train --task vision** classifies images, **--task seq2seq** translates, **--task summarization** "
    "summarizes.\n\n"
    "**floragrad train --resume runs/tiny-flora-20260131T120000Z** continues a run.\n\n"
    "**torchrun --nproc-per-node 2 -m floragrad train** divides every batch over two processes."
)


@dataclass(frozen=True)
class Place:
    """Options of the folder of a run or a comparison."""

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


def refuse_beside_resume(given: dict[str, Any], *allowed: str) -> None:
    """Refuse options beside ``--resume``."""
    others = [option_name(name) for name in given if name not in allowed]
    if others:
        raise UserError(
            f"--resume continues with the options that were given then, not {', '.join(others)}: give it alone"
        )


def run_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are fields of a configuration; a model's folder by its whole path."""
    fields = {name: value for name, value in given.items() if name in OPTIONS}
    if "model" in fields and fields["model"] not in PRESETS and Path(fields["model"]).is_dir():
        fields["model"] = str(Path(fields["model"]).resolve())
    return fields


def new_name(name: str) -> Path:
    """Return a folder below ``runs`` that is not there yet, and that no other process prepares."""
    stem = f"{name}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    candidates = (Path("runs", stem if number == 1 else f"{stem}-{number}") for number in range(1, 1000))
    return next(path for path in candidates if not path.exists() and not any(path.parent.glob(f".{path.name}.*")))


TRAIN_OPTIONS = {**OPTIONS, **options_of(Place)}


@command(app, TRAIN_OPTIONS, help=HELP, epilog=EXAMPLES)
def train(given: dict[str, Any]) -> None:
    """Train, or continue a run that stopped."""
    place, launch = take(Place, given), {name: given.get(name) for name in ("fsdp", "timeout")}
    _check_started(**launch)
    if place.resume is not None:
        refuse_beside_resume(given, "resume", *launch)
        _continue_training(place.resume, **launch)
        return
    config = RunConfig.resolve(**run_fields(given))
    machine.prepare(config.backend, hub=config.uses_hub, several=config.backend == "torch")
    from floragrad.cli.train.run import begin

    processes = join(config)
    with processes.together():
        folder = processes.share(
            lambda: begin(config, place.out or new_name(f"{Path(config.job).name}-{config.optimizer}"))
        )
    _train(folder, processes)


def _continue_training(path: Path, fsdp: bool | None, timeout: int | None) -> None:
    from floragrad.cli.train.folder import RunFolder

    folder = RunFolder.open(path)
    summary = folder.summary()
    if summary is not None:
        from floragrad.cli.train.display import Display

        if started() == 1:  # a kill after the summary leaves behind what is not kept
            folder.tidy(checkpoints=folder.config.keep_checkpoint)
        Display(Console(quiet=not is_spokesman())).summary(summary, str(path))
        return
    config = folder.config.launched(fsdp, timeout)
    several = config.backend == "torch"
    machine.prepare(config.backend, hub=config.uses_hub and not folder.checkpoints(), several=several)
    _train(folder, join(config))


def _train(folder: "RunFolder", processes: Processes) -> None:
    from floragrad.cli.train.display import Display
    from floragrad.cli.train.run import train

    display = Display(Console(quiet=not processes.leads))
    with processes.together(folder.path):
        display.summary(train(folder, display, processes), str(folder.path))


def _check_started(fsdp: bool | None, timeout: int | None) -> None:
    """Refuse options of several processes in one."""
    purposes = {"--fsdp": "divides the model over", "--timeout": "is how long to wait for one of"}
    for (name, purpose), given in zip(purposes.items(), (fsdp, timeout), strict=True):
        if given and started() == 1:
            raise UserError(
                f"{name} {purpose} several processes, and this is one: start them with torchrun --nproc-per-node 2 "
                f"-m floragrad train {name}, or leave it out"
            )
