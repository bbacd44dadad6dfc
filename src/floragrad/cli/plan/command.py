"""``floragrad plan``: options and entry point."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from floragrad.cli import machine
from floragrad.cli.app import app
from floragrad.cli.errors import UserError
from floragrad.cli.options import check_values, command, option, options_of, take
from floragrad.cli.plan import display
from floragrad.cli.plan.presets import MODELS
from floragrad.cli.plan.result import DEVICE, MemoryPlan, OptimizerName, PlanSettings
from floragrad.cli.plan.sizes import Size, parse_size
from floragrad.cli.plan.verdict import verdict_json

if TYPE_CHECKING:
    from floragrad.cli.plan.limits import Limits
    from floragrad.cli.plan.measure import Measurement

__all__ = ["app", "plan"]

OUTPUT = "Output"
NOTHING_FITS = 1
"""The exit code where no optimizer fits the device of ``--fits``."""
HELP = (
    "Say what a training step holds in memory with each optimizer, without holding it.\n\n"
    "One whole step (micro-batches, clipping, update) is run on tensors without memory, with the real model, "
    "optimizers and accumulator, and every byte is counted where it is made: no GPU, no weights, no download for "
    "a preset. With **--fits** it says what fits a device, and with **--largest** how far batch, sequence and rank go."
)
EXAMPLES = (
    "**floragrad plan gpt2** compares all optimizers on GPT-2 small, in float32.\n\n"
    "**floragrad plan llama-3-8b --dtype bfloat16 --sequence-length 2048 --accumulate 16 --fits 24GB** asks whether a "
    "device of 24 GB is enough.\n\n"
    "**floragrad plan t5-3b --optimizers adamw,flora --checkpointing --picture t5.png** draws the step.\n\n"
    "**floragrad plan my-model/config.json --json** prints one JSON object, and **--measure** does the step for real."
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options beside the settings of the step."""

    model: str = option(
        f"A preset ({', '.join(MODELS)}), the name of a model on the Hugging Face hub, a folder with a config.json, or "
        "a configuration file. No weights are read.",
        "",
        metavar="MODEL",
        argument=True,
    )
    fits: Size | None = option(
        "Memory of a device, like 24GB or 80GiB: says what fits, and with how much to spare. The exit code is 1 where "
        "no optimizer does.",
        DEVICE,
        default=None,
        metavar="SIZE",
        parse=parse_size,
    )
    largest: bool = option(
        "Of what fits: the largest batch, sequence and rank that still do. Takes some plans more.",
        DEVICE,
        default=False,
    )
    as_json: bool = option(
        "Print one JSON object, bytes as integers, and no table.", OUTPUT, default=False, flag="--json"
    )
    picture: Path | None = option(
        "Draw live bytes over one step, a panel for each optimizer: a .png, .jpg, .pdf or .svg.",
        OUTPUT,
        default=None,
        metavar="FILE",
    )
    measure: bool = option(
        "Also do the step for real on this machine, at a size that fits, and show predicted beside measured.",
        OUTPUT,
        default=False,
    )


PLAN_OPTIONS = options_of(PlanSettings, Request)


@command(app, PLAN_OPTIONS, help=HELP, epilog=EXAMPLES)
def plan(given: dict[str, Any]) -> None:
    """Plan a training step."""
    request, settings = take(Request, given), _settings(given)
    model, fits, picture = request.model, request.fits, request.picture
    if request.largest and fits is None:
        raise UserError("--largest looks for what fits a device, and none is given: add one, like --fits 24GB")
    if picture is not None:
        _check_picture(picture)
    machine.prepare("torch", hub=model not in MODELS and not Path(model).exists())
    from floragrad.cli.plan.engine import plan_subject
    from floragrad.cli.plan.limits import limits_of
    from floragrad.cli.plan.measure import measure as measured_steps
    from floragrad.cli.plan.models import find_model

    subject = find_model(model)
    sketched = any(name.startswith("flora") for name in settings.optimizers) and settings.ratio is None
    settings = replace(
        settings, sequence=subject.sequence(given.get("sequence")), rank=subject.rank(given.get("rank"), sketched)
    )
    profiles: dict[Any, Any] = {}
    with display.progress(Console(stderr=True)) as report:
        planned = plan_subject(subject, settings, report, profiles)
        limits = (
            limits_of(planned, subject, fits.nbytes, profiles, report) if request.largest and fits is not None else {}
        )
        measurement = measured_steps(subject, settings, report) if request.measure else None
    heading = display.title(planned, subject.reads_text)
    if request.as_json:
        print(json.dumps(_as_json(planned, fits, limits, measurement), indent=2))
    else:
        screen = display.screen()
        screen.print(display.plan_table(planned, heading))
        if fits is not None:
            screen.print(display.fits_table(planned, fits, limits, subject.reads_text))
        if measurement is not None:
            screen.print(display.measured_table(measurement, subject.reads_text))
    if picture is not None:
        _draw(planned, heading, fits, picture)
    if fits is not None and not any(row.peak <= fits.nbytes for row in planned.optimizers.values()):
        raise typer.Exit(NOTHING_FITS)


def _check_picture(path: Path) -> None:
    """Refuse a picture that cannot be written, before anything is planned."""
    if not path.parent.is_dir():
        raise UserError(f"--picture {path} lies in no folder that is there: make {path.parent}, or give another")
    if path.is_dir():
        raise UserError(f"--picture {path} is a folder: give a file, like {path / 'plan.png'}")
    from floragrad.cli.figures import file_format, formats

    if file_format(path) not in formats():
        raise UserError(
            f"--picture {path} names no kind of picture that can be drawn: give a file that ends with one of "
            f"{', '.join(f'.{name}' for name in formats())}"
        )


def _as_json(
    planned: MemoryPlan,
    device: Size | None,
    limits: "Mapping[OptimizerName, Limits]",
    measurement: "Measurement | None",
) -> dict[str, Any]:
    """Return the plan in plain types, with the verdicts on devices and the measurement."""
    plain = planned.to_json()
    if device is not None:
        plain["fits"] = {
            "memory": device.nbytes,
            "optimizers": {name: verdict_json(row, device) for name, row in planned.optimizers.items()},
        }
    if limits:
        plain["largest"] = {name: found.to_json() for name, found in limits.items()}
    if measurement is not None:
        plain["measured"] = {
            "blocks": measurement.blocks,
            "predicted": measurement.predicted.to_json(),
            "optimizers": {name: row.to_json() for name, row in measurement.measured.items()},
        }
    return plain


def _draw(planned: MemoryPlan, heading: str, device: Size | None, path: Path) -> None:
    from floragrad.cli.figures import save
    from floragrad.cli.plan.picture import plan_figure

    save(plan_figure(planned, heading, device), path)


def _settings(given: dict[str, Any]) -> PlanSettings:
    """Return the settings as far as no model is needed for them; a wrong one is named as the option that it is."""
    check_values(PLAN_OPTIONS, given)
    try:
        return take(PlanSettings, given)
    except ValueError as error:
        raise UserError(f"--{error}") from error
