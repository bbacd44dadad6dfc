"""``floragrad compare``: options and entry point."""

import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from floragrad.cli import machine
from floragrad.cli.app import app
from floragrad.cli.compare.plan import DEFAULTS, Grid, Plan, comparison_options
from floragrad.cli.options import command, options_of, take
from floragrad.cli.train.command import Place, new_name, refuse_beside_resume, run_fields
from floragrad.cli.train.config import OPTIONS, RunConfig

HELP = (
    "Do the same training run with several methods, one after another.\n\n"
    "Everything but the method is the same: weights, batches, schedule, parameter groups, and what trains the "
    "vocabulary. With several learning rates each method tries them all on the first seed, and its best goes on to the "
    "others. "
    "Writes one table (table.md, table.json) and two pictures (state.png, comparison.png), with the runs beside them. "
    "Ctrl-C saves, and **--resume** continues; runs that are finished are not done again."
)
EXAMPLES = (
    "**floragrad compare** runs Flora, AdamW and Adafactor on the default job.\n\n"
    "**floragrad compare --lrs 1e-3,2e-3,4e-3 --seeds 0,1,2** is a fair fight of AdamW-like rates.\n\n"
    "**floragrad compare --methods flora,muon,lora --lr-factors 0.5,1,2** tries multiples of each one's rate.\n\n"
    "**floragrad compare --methods flora,adamw --model small --text books/** is another job.\n\n"
    "**floragrad compare --task vision** is another task.\n\n"
    "**floragrad compare --resume runs/compare-tiny-20260131T120000Z** continues a comparison; beside it, --methods, "
    "--set, --seeds and rates add rows."
)
COMPARE_OPTIONS = comparison_options({**OPTIONS, **options_of(Place)})


@command(app, COMPARE_OPTIONS, help=HELP, epilog=EXAMPLES)
def compare(given: dict[str, Any]) -> None:
    """Compare, or continue a comparison that stopped."""
    place, grid = take(Place, given), {name: given[name] for name in options_of(Grid) if name in given}
    fields = {name: value for name, value in run_fields(given).items() if name not in grid}
    if place.resume is not None:
        refuse_beside_resume({name: value for name, value in given.items() if name not in grid}, "resume")
    config = RunConfig.resolve(**{**fields, "optimizer": "flora"}) if place.resume is None else None
    machine.prepare("torch", hub=config is not None and config.uses_hub)
    from floragrad.cli.compare import compare as comparison

    written = shlex.join(["floragrad", *sys.argv[1:]])
    if place.resume is not None:
        if grid:
            comparison.extend(place.resume, grid, written)
        comparison.compare(place.resume, Console())
        return
    assert config is not None
    plan = Plan(
        **grid,
        options={**DEFAULTS, "threads": machine.default_threads(), **fields},
        command=written,
    )
    out = place.out or new_name(f"compare-{Path(config.job).name}")
    comparison.begin(plan, out)
    comparison.compare(out, Console())
