"""The page says what was measured and what was not."""

from benchmarks.step.optimizers import FLORA_OPT, INT8
from benchmarks.step.picture import growth_figure
from benchmarks.step.report import cells, markdown, troubles
from benchmarks.step.shapes import LAYERS
from tests.benchmarks.results import made_up_results, made_up_run, wanted

FAILED = {"ratio": None, "quartiles": None, "median_ms": None, "first_seconds": None, "steps": 0}
FAILED |= {"state_bytes": None, "peak_bytes": None, "trouble": "RuntimeError: needs | a GPU\nand more"}


def test_a_failed_peer_is_listed_with_its_error() -> None:
    page = markdown(made_up_results(**{FLORA_OPT: FAILED}))
    assert f"- {FLORA_OPT}: RuntimeError: needs \\| a GPU and more" in page
    row = next(line for line in page.splitlines() if line.startswith(f"| {FLORA_OPT}"))
    assert row.count(" — |") == 7
    assert "not measured: flora-opt" in page


def test_the_page_names_machine_versions_and_commit() -> None:
    page = markdown(made_up_results(), "step_growth.png")
    machine = ("a processor, 2 cores, 24.0 GB", "torch 2.13.0", "commit 0123456789ab")
    for words in (*machine, "0.01 cores were busy", "(step_growth.png)"):
        assert words in page
    for heading in (f"A step: {LAYERS}, float32, 2 threads", "A step: t5-small, bfloat16, 1 thread"):
        assert f"## {heading}\n" in page


def test_goals_are_shown_where_their_layers_were_measured() -> None:
    results = made_up_results()
    assert "## Goals\n" in markdown(results)
    assert "float32 parameters, 2 threads, rank 128." in markdown(results)
    alone = [{**run, "threads": 1} for run in results["runs"]]
    assert "float32 parameters, 1 thread, rank 128." in markdown({**results, "runs": alone})
    others = [run for run in results["runs"] if run["shapes"] != LAYERS]
    assert others
    assert "## Goals\n" not in markdown({**results, "runs": others})


def test_every_line_of_a_table_has_as_many_cells() -> None:
    for run in wanted().runs():
        found = cells(made_up_run(run))
        assert len({len(row) for row in found}) == 1
        assert len(found) > 1


def test_a_hidden_peak_is_a_dash_and_no_trouble() -> None:
    run = made_up_run(wanted().runs()[0], **{INT8: {"peak_bytes": None}})
    (row,) = (row for row in cells(run) if row[0] == INT8)
    assert row[-2:] == ("—", "—")
    assert troubles(run) == []


def test_growth_is_drawn_where_it_was_measured() -> None:
    results = made_up_results(**{FLORA_OPT: FAILED})
    figure = growth_figure(results)
    assert figure is not None
    labels = {text.get_text() for panel in figure.axes for text in panel.get_legend().get_texts()}
    assert "copy of as many bytes" in labels
    assert FLORA_OPT not in labels
    assert growth_figure({**results, "runs": results["runs"][:1]}) is None
