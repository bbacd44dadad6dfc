from pathlib import Path

import pytest

from floragrad.cli.figures import save
from floragrad.cli.plan.picture import plan_figure
from floragrad.cli.plan.result import CATEGORIES, MemoryPlan, PlanSettings
from floragrad.cli.plan.sizes import parse_size
from tests.cli.plan.support import row, sample

STEP = (
    sample("forward of wte", parameters=2, activations=1),
    sample("forward of h.0", parameters=2, activations=3),
    sample("backward of h.0", parameters=2, activations=2, gradients=2),
    sample("clipping", parameters=2, gradients=2, temporaries=1),
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
    for place, total in {0: 3, 0.5: 5, 1: 6, 2: 5}.items():
        at = areas["temporaries"][areas["temporaries"][:, 0] == place]
        assert at[:, 1].max() == pytest.approx(total)
    gradients = areas["gradients"][areas["gradients"][:, 0] == 1]
    assert (gradients[:, 1].min(), gradients[:, 1].max()) == (pytest.approx(2), pytest.approx(4))


def test_the_dot_is_at_the_peak_and_each_pass_has_its_name() -> None:
    panel = plan_figure(PLAN, "title").axes[0]
    (dot,) = panel.lines
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([1], [6.0])
    assert list(panel.get_xticks()) == [0.5, 1.5, 2.5]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["forward", "backward", "update"]


def test_every_pass_is_as_wide_as_any_other_whatever_is_folded_in_it() -> None:
    """A backward pass with a fold for every tensor has many times the moments of one without."""
    folds = [sample(f"{word} of h.{number}", gradients=1) for number in range(50) for word in ("fold", "backward")]
    step = (STEP[0], STEP[2], *folds, STEP[0], STEP[2], sample("update of h.0", gradients=1), STEP[3], STEP[3])
    panel = plan_figure(MemoryPlan("m", PLAN.settings, {"flora": row(samples=step)}), "title").axes[0]
    places = sorted({float(place) for place in panel.collections[0].get_paths()[0].vertices[:, 0]})
    assert {0.0, 1.0, 2.0, 3.0, 4.0} < set(places)
    assert places[-1] == 4.5
    assert len(panel.get_xticks()) == 0, "five passes are too narrow for their names"


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
