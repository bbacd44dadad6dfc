"""``floragrad plan``: takes its options, has the step planned, and shows what came out."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from floragrad.planning import display, options
from floragrad.planning.presets import MODELS
from floragrad.planning.result import OPTIMIZERS, MemoryPlan, OptimizerName, PlanSettings
from floragrad.planning.sizes import Size
from floragrad.planning.verdict import verdict_json
from floragrad.train import environment
from floragrad.train.commands import app
from floragrad.train.errors import UserError

if TYPE_CHECKING:
    from floragrad.planning.limits import Limits
    from floragrad.planning.measure import Measurement

__all__ = ["app", "plan"]

ALL = ",".join(OPTIMIZERS)
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


@app.command(help=HELP, epilog=EXAMPLES)
def plan(
    model: options.Model,
    batch: options.Batch = 1,
    sequence_length: options.SequenceLength = None,
    dtype: options.WeightsDtype = "float32",
    accumulate: options.Accumulate = 1,
    checkpointing: options.Checkpointing = False,
    optimizers: options.Optimizers = ALL,
    rank: options.Rank = None,
    ratio: options.Ratio = None,
    state_dtype: options.MomentumDtype = "int8",
    ddp: options.Ddp = 1,
    fsdp: options.Fsdp = 1,
    fits: options.Fits = None,
    largest: options.Largest = False,
    as_json: options.Json = False,
    picture: options.Picture = None,
    measure: options.Measure = False,
) -> None:
    """Plan a training step."""
    settings = _settings(
        batch=batch,
        dtype=dtype,
        optimizers=tuple(part.strip() for part in optimizers.split(",") if part.strip()),
        ratio=ratio,
        state_dtype=state_dtype,
        accumulate=accumulate,
        checkpointing=checkpointing,
        ddp=ddp,
        fsdp=fsdp,
    )
    if largest and fits is None:
        raise UserError("--largest looks for what fits a device, and none is given: add one, like --fits 24GB")
    if picture is not None:
        _check_picture(picture)
    environment.prepare("torch", hub=model not in MODELS and not Path(model).exists())
    from floragrad.planning.engine import plan_subject
    from floragrad.planning.limits import limits_of
    from floragrad.planning.measure import measure as measured_steps
    from floragrad.planning.models import find_model

    subject = find_model(model)
    sketched = any(name.startswith("flora") for name in settings.optimizers) and ratio is None
    settings = replace(settings, sequence=subject.sequence(sequence_length), rank=subject.rank(rank, sketched))
    profiles: dict[Any, Any] = {}
    with display.progress(Console(stderr=True)) as report:
        planned = plan_subject(subject, settings, report, profiles)
        limits = limits_of(planned, subject, fits.nbytes, profiles, report) if largest and fits is not None else {}
        measurement = measured_steps(subject, settings, report) if measure else None
    heading = display.title(planned, subject.reads_text)
    if as_json:
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
    from floragrad.train.figures import file_format, formats

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
    """The plan in plain types, and beside it what was asked of devices and of this machine."""
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
    from floragrad.planning.picture import plan_figure
    from floragrad.train.figures import save

    save(plan_figure(planned, heading, device), path)


def _settings(**given: Any) -> PlanSettings:
    """The settings as far as no model is needed for them; a wrong one is named as the option that it is."""
    try:
        return PlanSettings(**given)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from error
