"""Figure 2 on toy models: predicted bytes are measured, by category, and the page and the picture are made."""

from dataclasses import replace
from pathlib import Path

import pytest

from replication import figure2
from replication.figure2 import SETTINGS, Profile, main, profile
from tests.cli.plan.engine_cases import SMALL, gpt2, subject

SINGLES = 64
"""Bytes of single numbers, for which closed forms leave room."""


@pytest.fixture(scope="module")
def toy() -> Profile:
    """A GPT-2 of two blocks."""
    return profile(subject("gpt2"), replace(SMALL, accumulate=2), steps=2)


@pytest.mark.parametrize("name", SETTINGS)
def test_predicted_is_measured(toy: Profile, name: str) -> None:
    predicted, measured = toy.predicted[name], toy.measured[name].row
    for category in ("parameters", "optimizer_state", "accumulation", "gradients"):
        assert getattr(predicted, category) == getattr(measured, category), category
    assert toy.difference(name) <= SINGLES


def test_every_setting_needs_less_than_the_one_before(toy: Profile) -> None:
    peaks = [toy.measured[name].row.peak for name in SETTINGS]
    assert peaks == sorted(peaks, reverse=True)


def test_the_page_and_the_picture_have_every_setting(
    toy: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure2, "profile", lambda *given: toy if len(given) > 2 else replace(toy, measured={}))
    gpt2(2).save_pretrained(tmp_path)
    main(["--models", str(tmp_path), "--predict", "t5-3b", "--out", str(tmp_path)])
    text = (tmp_path / "figure2.md").read_text()
    for name in SETTINGS:
        assert [text.count(f"| {name} | {kind} |") for kind in ("measured", "predicted")] == [1, 2]
    assert text.index("## t5-3b") < text.index("Predicted only")
    assert (tmp_path / "figure2.png").stat().st_size > 10_000
