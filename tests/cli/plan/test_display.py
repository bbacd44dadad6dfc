import io

import pytest
from rich.console import Console
from rich.table import Table

from floragrad.cli.plan.display import WIDTH_WITHOUT_TERMINAL, fits_table, plan_table, progress, title
from floragrad.cli.plan.result import MemoryPlan, PlanSettings
from floragrad.cli.plan.sizes import parse_size
from tests.cli.plan.support import row

ROWS = {
    "adamw": row(parameters=1, gradients=2, optimizer_state=3, activations=4, temporaries=5),
    "flora": row(parameters=1, accumulation=6, buckets=7, peak_moment="update of lm_head.weight"),
}
SETTINGS = PlanSettings(optimizers=("adamw", "galore", "flora"))


def plan(settings: PlanSettings) -> MemoryPlan:
    return MemoryPlan("gpt2", settings, ROWS, {"galore": "galore_torch is not installed"})


def shown(table: Table) -> list[list[str]]:
    """The cells of a table, line by line."""
    screen = io.StringIO()
    Console(file=screen, width=WIDTH_WITHOUT_TERMINAL).print(table)
    lines = [line.replace("┃", "│") for line in screen.getvalue().splitlines()]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]


def test_every_category_has_its_column() -> None:
    head, adamw, galore, flora = shown(plan_table(plan(SETTINGS), "title"))
    assert head == [
        "optimizer", "parameters", "gradients", "accumulation buffers", "optimizer state", "activations",
        "temporaries", "peak", "at the peak",
    ]  # fmt: skip
    assert adamw == [
        "adamw", "1.0 GB", "2.0 GB", "0 B", "3.0 GB", "4.0 GB", "5.0 GB", "15.0 GB", "backward of model.layers.3",
    ]  # fmt: skip
    assert galore == ["galore", *[""] * 7, "galore_torch is not installed"]
    assert flora == ["flora", "1.0 GB", "0 B", "6.0 GB", *["0 B"] * 3, "14.0 GB", "update of lm_head.weight"]


@pytest.mark.parametrize("devices", [{"ddp": 2}, {"fsdp": 2}], ids=str)
def test_buckets_are_shown_where_there_are_several_devices(devices: dict[str, int]) -> None:
    head, _, _, flora = shown(plan_table(plan(PlanSettings(optimizers=SETTINGS.optimizers, **devices)), "title"))
    assert head[7:9] == ["buckets", "sent"]
    assert flora[7:9] == ["7.0 GB", "0 B"]


@pytest.mark.parametrize(
    ("settings", "reads_text", "words"),
    [
        (PlanSettings(), True, "m: batch 1 x 1,024 tokens, float32"),
        (PlanSettings(batch=8), False, "m: batch 8, float32"),
        (
            PlanSettings(dtype="bfloat16", accumulate=16, checkpointing=True, ddp=4),
            True,
            "m: batch 1 x 1,024 tokens, bfloat16, 16 micro-batches, activations recomputed, DDP over 4 devices",
        ),
        (PlanSettings(sequence=8, fsdp=2), True, "m: batch 1 x 8 tokens, float32, FSDP2 over 2 devices"),
        (
            PlanSettings(sequence=8, fsdp=2, accumulate=4, defer_reduction=True),
            True,
            "m: batch 1 x 8 tokens, float32, 4 micro-batches, FSDP2 over 2 devices, reduced once",
        ),
    ],
)
def test_the_title_says_what_was_asked_for(settings: PlanSettings, reads_text: bool, words: str) -> None:
    assert title(MemoryPlan("m", settings, {}), reads_text) == words


def test_the_verdict_stands_beside_the_optimizer() -> None:
    head, adamw, flora = shown(fits_table(plan(SETTINGS), parse_size("14GB"), reads_text=True))
    assert head == ["optimizer", "verdict"]
    assert adamw[0] == "adamw"
    assert adamw[1].startswith("does not fit 14 GB, by 1.0 GB: the peak is the temporaries, try flora")
    assert flora == ["flora", "fits 14 GB with 0 B to spare"]


def test_the_bar_says_what_is_done_on_a_terminal_and_nothing_elsewhere() -> None:
    terminal, file = io.StringIO(), io.StringIO()
    for console in (Console(file=terminal, force_terminal=True, width=120), Console(file=file)):
        with progress(console) as report:
            report("tracing flora", 0.5)
    assert "tracing flora" in terminal.getvalue()
    assert file.getvalue() == ""
