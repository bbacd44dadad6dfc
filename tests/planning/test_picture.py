from pathlib import Path

import pytest

from floragrad.planning.picture import plan_figure
from floragrad.planning.result import CATEGORIES, MemoryPlan, PlanSettings
from floragrad.planning.sizes import parse_size
from floragrad.train.figures import save
from tests.planning.support import row, sample

STEP = (
    sample("forward of wte", parameters=2, activations=1),
    sample("forward of h.0", parameters=2, activations=3),
    sample("backward of h.0", parameters=2, activations=2, gradients=2),
    sample("update of wte", parameters=2, gradients=2, temporaries=1),
)
PLAN = MemoryPlan(
    "gpt2",
    PlanSettings(optimizers=("adamw", "flora")),
    {"adamw": row(parameters=6, samples=STEP), "flora": row(parameters=3, samples=STEP[:2])},
)


def test_a_panel_for_each_optimizer_on_one_scale() -> None:
    adamw, flora = plan_figure(PLAN, "title").axes
    assert [panel.get_title(loc="left") for panel in (adamw, flora)] == ["adamw: 6.0 GB", "flora: 3.0 GB"]
    assert adamw.get_ylim() == flora.get_ylim()
    assert adamw.get_ylim()[1] >= 6, "the scale holds the highest panel"


def test_the_areas_are_the_bytes_on_top_of_each_other() -> None:
    panel = plan_figure(PLAN, "title").axes[0]
    areas = {area.get_label(): area.get_paths()[0].vertices for area in panel.collections}
    assert list(areas) == [
        "parameters", "optimizer state", "accumulation buffers", "gradients", "buckets", "activations", "temporaries",
    ]  # fmt: skip
    assert len(areas) == len(CATEGORIES)
    for number, total in enumerate([3, 5, 6, 5]):
        at = areas["temporaries"][areas["temporaries"][:, 0] == number]
        assert at[:, 1].max() == pytest.approx(total)
    gradients = areas["gradients"][areas["gradients"][:, 0] == 2]
    assert (gradients[:, 1].min(), gradients[:, 1].max()) == (pytest.approx(2), pytest.approx(4))


def test_the_dot_is_at_the_peak_and_the_phases_at_their_beginnings() -> None:
    panel = plan_figure(PLAN, "title").axes[0]
    (dot,) = panel.lines
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([2], [6.0])
    assert list(panel.get_xticks()) == [0, 2, 3]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["forward", "backward", "update"]


def test_the_device_is_a_line(tmp_path: Path) -> None:
    figure = plan_figure(PLAN, "title", parse_size("24GB"))
    for panel in figure.axes:
        _, line = panel.lines
        assert set(line.get_ydata()) == {24.0}
        assert line.get_label() == "24 GB"
    save(figure, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_panels_that_are_not_needed_are_empty() -> None:
    plan = MemoryPlan("m", PLAN.settings, {f"row {number}": PLAN.optimizers["adamw"] for number in range(5)})
    figure = plan_figure(plan, "title")
    assert [panel.axison for panel in figure.axes] == [True] * 5 + [False] * 3
