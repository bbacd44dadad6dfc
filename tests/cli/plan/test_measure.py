"""The steps that are run for real, at a size that fits."""

from dataclasses import replace

import pytest

from floragrad.cli.errors import UserError
from floragrad.cli.plan.measure import measure
from tests.cli.plan.engine_cases import SMALL, subject

SETTINGS = replace(SMALL, optimizers=("adamw", "flora+release"), sequence=48, accumulate=4)


def test_every_row_is_run_and_predicted_at_one_size() -> None:
    found = measure(subject("llama", 3), replace(SETTINGS, ddp=2, optimizers=("adamw", "flora")))
    assert found.blocks == 3
    assert (found.predicted.settings.batch, found.predicted.settings.accumulate) == (1, 3)
    assert found.predicted.settings.ddp == 1
    for name, row in found.measured.items():
        there = found.predicted.optimizers[name]
        assert row.optimizer_state == there.optimizer_state
        assert row.gradients == there.gradients
        assert abs(row.peak - there.peak) <= 0.02 * row.peak


def test_blocks_are_left_out_until_it_fits() -> None:
    whole = measure(subject("llama", 4), SETTINGS)
    largest = max(row.peak for row in whole.predicted.optimizers.values())
    less = measure(subject("llama", 4), SETTINGS, budget=largest - 1)
    assert less.blocks == 2
    assert max(row.peak for row in less.measured.values()) < largest


def test_what_does_not_fit_at_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"for the least of MODEL llama, and 1\.0 kB may be taken here"):
        measure(subject("llama", 2), SETTINGS, budget=1000)
