"""The short benchmarks run to their ends on tiny shapes."""

from pathlib import Path

import pytest

from benchmarks import accumulation_fold, accumulation_memory, jax_step


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.PAUSE", 0)


def test_folds_are_timed_beside_the_sum(tmp_path: Path) -> None:
    accumulation_fold.main(["--rounds", "2", "--out", str(tmp_path)], shapes=((64, 96),))
    page = (tmp_path / "accumulation_fold.md").read_text()
    assert "| sum | 1.00 (1.00 – 1.00) |" in page
    assert all(f"| {dtype}, ρ = {ratio} | " in page for dtype, ratio in accumulation_fold.KINDS)
    assert "for each micro-batch: 0.01" in page


def test_a_window_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = accumulation_memory.Job(hidden=64, layers=2, vocabulary=256, steps=2, tokens=24)
    accumulation_memory.main(["--out", str(tmp_path)], job)
    assert (tmp_path / "accumulation_memory.png").stat().st_size > 10_000
    assert "| GradientAccumulator | " in capsys.readouterr().out


def test_jax_optimizers_update_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_step, "KERNELS", {"up": (96, 192)})
    jax_step.main(["--layers", "1", "--rounds", "2", "--out", str(tmp_path)])
    page = (tmp_path / "jax_step.md").read_text()
    assert all(f"| {name} | " in page for name in jax_step.OPTIMIZERS)
    assert f"| {jax_step.BASE} | 1.00 (1.00 – 1.00) |" in page
