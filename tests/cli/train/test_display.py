import io
from pathlib import Path

import pytest
from rich.console import Console

from floragrad.cli.figures import run_figure, save
from floragrad.cli.train.display import Display, duration

METRICS = [
    {"step": 0, "validation_loss": 7.0},
    {"step": 1, "loss": 7.0},
    {"step": 2, "loss": 5.0},
    {"step": 3, "loss": None},
    {"step": 3, "validation_loss": 4.0},
]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (94, "1 min 34 s"), (3599.9, "1 h 00 min"), (7380, "2 h 03 min")],
)
def test_time_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_without_a_terminal_progress_is_ten_lines() -> None:
    screen = io.StringIO()
    display = Display(Console(file=screen))
    display.begin(0, 100)
    for step in range(1, 101):
        display.step(step, 3.0, 1234.0, 5_000_000)
    display.end()
    lines = screen.getvalue().splitlines()
    assert lines[0] == "step 10/100 · loss 3.000 · 1,234 tokens/s · 5.0 MB"
    assert [line.partition(" · ")[0] for line in lines] == [f"step {step}/100" for step in range(10, 101, 10)]


def test_on_a_terminal_progress_is_a_bar_with_loss_speed_and_memory() -> None:
    screen = io.StringIO()
    display = Display(Console(file=screen, force_terminal=True, width=120))
    display.begin(40, 100)
    display.step(41, 2.5, 1234.0, 5_000_000)
    display.end()
    shown = screen.getvalue()
    assert "41/100" in shown
    assert "loss 2.500 · 1,234 tokens/s · 5.0 MB" in shown


def test_brackets_in_names_are_text() -> None:
    screen = io.StringIO()
    Display(Console(file=screen)).say("runs/[red]x")
    assert screen.getvalue() == "runs/[red]x\n"


def test_a_runs_figure_shows_what_was_measured(tmp_path: Path) -> None:
    figure = run_figure(METRICS, "title")
    raw, smoothed, validation = figure.axes[0].lines
    assert (list(raw.get_xdata()), list(raw.get_ydata())) == ([1, 2], [7.0, 5.0])
    first, second = smoothed.get_ydata()
    assert first == pytest.approx(7.0)
    assert second == pytest.approx((0.95 * 7 + 5) / 1.95)
    assert list(validation.get_ydata()) == [7.0, 4.0]
    save(figure, tmp_path / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
