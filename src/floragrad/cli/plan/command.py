"""``floragrad plan``: options and entry point."""

import json
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
from floragrad.cli.plan.result import DEVICE, MemoryPlan, PlanSettings
from floragrad.cli.plan.sizes import Size, parse_size
from floragrad.cli.plan.verdict import verdict_json

if TYPE_CHECKING:
    from floragrad.cli.plan.recipe import Recipe

__all__ = ["app", "plan"]

OUTPUT = "Output"
NOTHING_FITS = 1
"""The exit code where no optimizer fits the device of ``--fits``."""
HELP = (
    "Say what a training step holds in memory with each optimizer, without holding it.\n\n"
    "The real model and the other optimizers are run on tensors without memory, and every byte is counted where it is "
    "made; Flora's own bytes are computed: no GPU, no weights, no download for a preset. With **--fits** it says what "
    "fits a device."
)
EXAMPLES = (
    "**floragrad plan gpt2** compares all optimizers on GPT-2 small, in float32.\n\n"
    "**floragrad plan llama-3-8b --dtype bfloat16 --sequence-length 2048 --accumulate 16 --fits 24GB** asks whether a "
    "device of 24 GB is enough.\n\n"
    "**floragrad plan t5-3b --optimizers adamw,flora --checkpointing --picture t5.png** draws the step.\n\n"
    "**floragrad plan my-model/config.json --json** prints one JSON object."
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
        "Memory of a device, like 24GB or 80GiB: says what fits, and with how much to spare, and prints the code of a "
        "step of Flora that does. The exit code is 1 where no optimizer of the table does.",
        DEVICE,
        default=None,
        metavar="SIZE",
        parse=parse_size,
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


PLAN_OPTIONS = options_of(PlanSettings, Request)


@command(app, PLAN_OPTIONS, help=HELP, epilog=EXAMPLES)
def plan(given: dict[str, Any]) -> None:
    """Plan a training step."""
    request, settings = take(Request, given), _settings(given)
    model, fits, picture = request.model, request.fits, request.picture
    if picture is not None:
        _check_picture(picture)
    machine.prepare("torch", hub=model not in MODELS and not Path(model).exists())
    from floragrad.cli.plan.engine import Planner
    from floragrad.cli.plan.models import find_model
    from floragrad.cli.plan.recipe import NOTHING, find_recipe

    subject = find_model(model)
    sketched = any(name.startswith("flora") for name in settings.optimizers) and settings.ratio is None
    settings = replace(
        settings, sequence=subject.sequence(given.get("sequence")), rank=subject.rank(given.get("rank"), sketched)
    )
    with_flora = any(name.startswith("flora") for name in settings.optimizers)
    device = fits if with_flora and settings.ddp == settings.fsdp == 1 else None
    planner = Planner(subject, settings)
    with display.progress(Console(stderr=True)) as report:
        planned = planner.plan(report)
        recipe = None if device is None else find_recipe(planner, device)
    heading = display.title(planned, subject.reads_text)
    if request.as_json:
        print(json.dumps(_as_json(planned, fits, recipe), indent=2))
    else:
        screen = display.screen()
        screen.print(display.plan_table(planned, heading))
        if fits is not None:
            screen.print(display.fits_table(planned, fits, subject.reads_text))
        if device is not None:
            print(f"\n{recipe.describe(device, subject.reads_text)}\n\n{recipe.code()}" if recipe else f"\n{NOTHING}")
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


def _as_json(planned: MemoryPlan, device: Size | None, recipe: "Recipe | None") -> dict[str, Any]:
    """Return the plan in plain types, with the verdicts on devices."""
    plain = planned.to_json()
    if device is not None:
        plain["fits"] = {
            "memory": device.nbytes,
            "optimizers": {name: verdict_json(row, device) for name, row in planned.optimizers.items()},
            "recipe": recipe.to_json() if recipe else None,
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
