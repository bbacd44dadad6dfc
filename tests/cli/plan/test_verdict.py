from typing import Any

import pytest

from floragrad.cli.plan.result import PlanSettings
from floragrad.cli.plan.sizes import parse_size
from floragrad.cli.plan.verdict import WORDS, verdict, verdict_json
from tests.cli.plan.support import GIGA, row

DEVICE = parse_size("24GB")
CHECKPOINTED = {"checkpointing": True}


def test_room_to_spare_is_said() -> None:
    assert verdict("flora", row(parameters=20.9), PlanSettings(), DEVICE) == "fits 24 GB with 3.1 GB to spare"


def test_to_the_byte_is_enough_and_a_byte_more_is_not() -> None:
    exact, over = row(parameters=24), row(parameters=24 + 1 / GIGA)
    assert verdict("flora", exact, PlanSettings(), DEVICE) == "fits 24 GB with 0 B to spare"
    assert verdict("flora", over, PlanSettings(), DEVICE).startswith("does not fit 24 GB, by 1 B: ")
    assert verdict_json(exact, DEVICE) == {"fits": True, "spare": 0}
    assert verdict_json(over, DEVICE) == {"fits": False, "spare": -1}


@pytest.mark.parametrize(
    ("name", "largest", "settings", "way"),
    [
        ("adamw", "parameters", {}, "--dtype bfloat16"),
        ("adamw", "parameters", {"dtype": "bfloat16"}, "--fsdp 2"),
        ("adamw", "parameters", {"dtype": "bfloat16", "fsdp": 4}, "--fsdp 8"),
        ("adamw", "parameters", {"dtype": "bfloat16", "ddp": 4}, "--fsdp 4"),
        ("adamw", "gradients", {}, "flora+release"),
        ("adamw", "gradients", {"ddp": 2}, "flora+accumulator"),
        ("flora+accumulator", "gradients", {"ddp": 2}, "--fsdp 2"),
        ("flora+release", "gradients", {}, "--fsdp 2"),
        ("flora+accumulator", "accumulation", {}, "flora+release"),
        ("adamw", "optimizer_state", {}, "flora"),
        ("flora", "optimizer_state", {}, "--state-dtype int4"),
        ("flora", "optimizer_state", {"state_dtype": "int4"}, "--fsdp 2"),
        ("adamw", "activations", {}, "--checkpointing"),
        ("adamw", "activations", {**CHECKPOINTED, "batch": 2}, "a smaller --batch"),
        ("adamw", "activations", CHECKPOINTED, "a shorter --sequence-length"),
        ("galore", "temporaries", {}, "flora"),
        ("adamw", "buckets", {"ddp": 2}, "--fsdp 2"),
        ("flora+release", "parameters", {"dtype": "bfloat16"}, "--fsdp 2"),
    ],
)
def test_the_way_out_is_one_that_is_not_taken_yet(name: str, largest: str, settings: dict[str, Any], way: str) -> None:
    held = {"parameters": 1, "activations": 1, largest: 30}
    said = verdict(name, row(**held), PlanSettings(**settings), DEVICE)
    over = sum(held.values()) - 24
    assert said == f"does not fit 24 GB, by {over}.0 GB: the peak is the {WORDS[largest]}, try {way}"


def test_where_the_largest_must_stay_the_next_one_is_named_too() -> None:
    settings = PlanSettings(dtype="bfloat16")
    said = verdict("flora+release", row(parameters=16, activations=13, accumulation=5), settings, DEVICE)
    assert said == "does not fit 24 GB, by 10.0 GB: the peak is the parameters and the activations, try --checkpointing"


def test_a_little_over_needs_a_little_shrinking() -> None:
    settings = PlanSettings(dtype="bfloat16", accumulate=16, checkpointing=True)
    held = row(parameters=16.1, accumulation=4.5, activations=3.8)
    assert verdict("flora+release", held, settings, DEVICE) == (
        "does not fit 24 GB, by 400.0 MB: the peak is the parameters and the activations, "
        "try a shorter --sequence-length"
    )
    much = row(parameters=26.1, accumulation=4.5, activations=3.8)
    assert verdict("flora+release", much, settings, DEVICE).endswith("the peak is the parameters, try --fsdp 2")


def test_what_would_have_to_vanish_is_not_named() -> None:
    settings = PlanSettings(dtype="bfloat16", checkpointing=True)
    half, more = row(parameters=23, activations=2), row(parameters=23.1, activations=1.9)
    assert verdict("flora", half, settings, DEVICE).endswith("and the activations, try a shorter --sequence-length")
    assert verdict("flora", more, settings, DEVICE).endswith("is the parameters, try --fsdp 2")


def test_images_have_no_sequence_to_shorten() -> None:
    said = verdict("flora", row(activations=30), PlanSettings(checkpointing=True), DEVICE, reads_text=False)
    assert said == "does not fit 24 GB, by 6.0 GB: the peak is the activations, try --fsdp 2"
