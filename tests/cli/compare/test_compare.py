import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from rich.console import Console

from floragrad.cli.compare import worker
from floragrad.cli.compare.compare import begin, compare, extend
from floragrad.cli.compare.picture import comparison_figure, picture, state_figure
from floragrad.cli.compare.plan import Plan
from floragrad.cli.compare.table import Best, difference
from floragrad.cli.errors import StoppedError, UserError
from floragrad.cli.presets import PRESETS
from floragrad.cli.train import adopt
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.folder import RunFolder, new_folder
from tests.cli.train.support import FAST, Here, command, fast_config, read_json, run, timeless, tree

pytestmark = pytest.mark.usefixtures("one_layer")

QUICK = {**FAST, "steps": 3, "keep_checkpoint": False}


def plan(texts: Path, *methods: str, **changes: Any) -> Plan:
    options = {**QUICK, "text": (str(texts),), **changes.pop("options", {})}
    values = {"accumulators": None, "seeds": (0,), "lrs": None, "embedding_lrs": None}
    values |= {"options": options, "command": "floragrad compare"}
    return Plan(methods=methods, **{**values, **changes})


def cells(lines: list[str], number: int) -> dict[str, str]:
    """A line of the Markdown table, by the heads of the columns."""
    heads, row = ([cell.strip() for cell in lines[each].strip("|").split("|")] for each in (0, number))
    return dict(zip(heads, row, strict=True))


def done(plan: Plan, out: Path) -> dict[str, Any]:
    """Do a comparison, and read its table."""
    begin(plan, out)
    compare(out, Console(quiet=True))
    return read_json(out / "table.json")


def test_the_best_of_the_grid_goes_on_to_the_other_seeds(texts: Path, tmp_path: Path, here: Here) -> None:
    lrs, embedding_lrs = (1e-6, 3e-3), (2e-2, 1e-5)
    made = plan(texts, "adamw", "flora", seeds=(3, 1), lrs=lrs, embedding_lrs=embedding_lrs)
    table = done(made, tmp_path / "out")
    assert len(here.titles) == made.runs == 10
    assert here.titles[0] == "1/10 adamw-lr1e-06-embedding0.02-seed3"
    for row in table["rows"]:
        grid = [tried for tried in table["grid"] if tried["optimizer"] == row["optimizer"]]
        assert [(tried["lr"], tried["embedding_lr"]) for tried in grid] == [
            (lr, embedding_lr) for lr in lrs for embedding_lr in embedding_lrs
        ]
        assert {tried["seed"] for tried in grid} == {3}
        best = min(grid, key=lambda tried: tried["validation_loss"])
        assert (row["lr"], row["embedding_lr"]) == (best["lr"], best["embedding_lr"])
        losses = row["validation_losses"]
        assert losses[0] == best["validation_loss"]
        assert len(losses) == 2
        assert losses[0] != losses[1]
        assert row["validation_loss"] == pytest.approx(mean(losses))
        assert row["validation_loss_stdev"] == pytest.approx(stdev(losses))
        assert (row["validation_loss_min"], row["validation_loss_max"]) == (min(losses), max(losses))


def test_a_row_says_what_its_runs_say(texts: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    table = done(plan(texts, "flora", "adamw", options={"rank": 8}), out)
    summaries = {path.name.partition("-")[0]: read_json(path / "summary.json") for path in (out / "runs").iterdir()}
    for row in table["rows"]:
        summary = summaries[row["optimizer"]]
        assert row["validation_loss"] == summary["validation_loss"]
        assert row["optimizer_state_bytes"] == summary["optimizer_state_bytes"]
        assert row["state_of_adamw"] == (summary["optimizer_state_bytes"] / summaries["adamw"]["optimizer_state_bytes"])
        assert row["peak_memory_bytes"] == summary["peak_memory_bytes"]
        assert row["step_time_ratio"] == summary["step_seconds"] / summaries["adamw"]["step_seconds"]
    assert {path.name.partition("-")[0]: RunFolder.open(path).config.rank for path in (out / "runs").iterdir()} == {
        "flora": 8,
        "adamw": None,
    }
    lines = (out / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| flora", "| adamw"]
    assert f"{table['rows'][0]['validation_loss']:.4f}" in lines[2]
    assert "- `floragrad compare`" in lines
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_state_of_hidden_matrices_has_a_column(texts: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    methods = ("adamw", "flora-full", "flora-none", "sinkgd")
    rows = done(plan(texts, *methods, options={"vocabulary": "shared"}), out)["rows"]
    kept = {row["label"]: row["bytes_per_hidden_parameter"] for row in rows}
    assert kept["adamw"] == pytest.approx(8, abs=1e-3)
    assert 4 < kept["flora-full"] < 4.1
    assert 0 < kept["flora-none"] < 0.1
    assert kept["sinkgd"] == 0
    lines = (out / "table.md").read_text().splitlines()
    assert [cells(lines, number)["state / hidden parameter"] for number in (2, 5)] == ["8 B", "0 B"]
    assert (out / "state.png").read_bytes().startswith(b"\x89PNG")


def test_settings_are_compared_with_each_other(
    texts: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], layers=3))  # of one layer, two settings lose alike
    settings = ("ratio=2,4", "state_dtype=int8,float32")
    made = plan(texts, "flora", "flora-full", "adamw", set=settings, options={"vocabulary": "shared"})
    assert [row.contestant.get("set", ()) for row in made.rows] == [
        *((f"ratio={ratio}", f"state_dtype={dtype}") for ratio in (2, 4) for dtype in ("int8", "float32")),
        *[()] * 2,
    ]
    out = tmp_path / "out"
    table = done(made, out)
    kept = {row["label"]: row["bytes_per_hidden_parameter"] for row in table["rows"]}
    assert list(kept)[:2] == ["flora ratio=2 state_dtype=int8", "flora ratio=2 state_dtype=float32"]
    assert len({row["validation_loss"] for row in table["rows"]}) == 6
    assert kept["flora ratio=4 state_dtype=float32"] < 0.6 * kept["flora ratio=2 state_dtype=float32"]
    assert len(here.titles) == made.runs == 6


def test_a_factor_multiplies_each_methods_own_rate(texts: Path) -> None:
    made = plan(texts, "flora", "racs", lr_factors=(0.5, 2.0))
    assert [[config.lr for config in made.settings(row)] for row in made.rows] == [[5e-4, 2e-3], [1e-2, 4e-2]]


def test_a_method_that_is_not_installed_has_a_row_that_says_how(
    texts: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    made = plan(texts, "gefen", "adamw", seeds=(0, 1))
    with monkeypatch.context() as patch:
        patch.setattr("floragrad.cli.peers.find_spec", lambda name: None if name == "gefen" else name)
        table = done(made, out)
        assert made.runs == len(here.titles) == 2
    missing, adamw = table["rows"]
    assert (missing["validation_loss"], adamw["validation_loss"] is None) == (None, False)
    assert missing["remedy"] == "pip install 'floragrad[rivals]'"
    assert (
        "| gefen | 0.001 | 0.01 | not installed: pip install 'floragrad[rivals]' | – |"
        in (out / "table.md").read_text()
    )
    assert {tried["label"] for tried in table["grid"]} == {"adamw"}


def test_a_comparison_of_an_earlier_version_goes_on(texts: Path, tmp_path: Path) -> None:
    made = plan(texts, "adamw")
    out = tmp_path / "out"
    begin(made, out)
    values = read_json(out / "comparison.json")
    names = ("methods", "set", "lr_factors")
    older = {name: value for name, value in values.items() if name not in names}
    (out / "comparison.json").write_text(json.dumps({"optimizers": values["methods"], **older}))
    (out / "manifest.json").unlink()
    adopt.adopt(out)
    assert Plan.load(out) == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lrs": (1.0,), "lr_factors": (2.0,)}, "--lrs and --lr-factors are both given: leave one out"),
        ({"lr_factors": (0.0,)}, "--lr-factors is 0.0: give a number above 0"),
        ({"set": ("beta1=0.5,none",)}, "--set beta1 belongs to flora, which is not compared: leave it out"),
        ({"set": ("beta=0.5",)}, "--set beta is no option of Flora"),
    ],
    ids=str,
)
def test_an_impossible_comparison_is_refused(
    texts: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        begin(plan(texts, "adamw", "flora-none", **changes), tmp_path / "out")
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "out").exists()


def best(method: str, loss: float, state: int, *settings: str) -> Best:
    config = RunConfig.resolve(optimizer=method, set=settings)
    summary = {"validation_loss": loss, "hidden_parameters": 100, "hidden_state_bytes": state}
    return Best(config, Path(), (0, 1), [summary, {**summary, "validation_loss": loss + 0.5}], [])


def test_the_picture_joins_rows_that_differ_in_their_ratio() -> None:
    found = picture(
        [
            best("flora", 3.0, 200, "ratio=1"),
            best("flora", 4.0, 10, "ratio=4", "state_dtype=int4"),
            best("flora", 3.2, 100, "ratio=2"),
            best("flora", 3.3, 100, "ratio=2", "kappa=never"),
            best("flora", 3.4, 100, "ratio=2", "residual=false"),
            best("flora-none", 5.0, 1),
            best("flora-full", 2.0, 400),
            best("adamw", 3.1, 800),
            best("sinkgd", 3.6, 0),
            Best(RunConfig.resolve(optimizer="muon"), Path(), (0,), [{"validation_loss": None}], []),
        ]
    )
    assert {name: [(point.bytes, point.loss) for point in curve] for name, curve in found.curves.items()} == {
        "flora int8 sign κ=1000": [(1, 3.45), (2, 3.25)],
        "flora int4 sign κ=1000": [(0.1, 4.25)],
        "flora int8 sign κ=never": [(1, 3.55)],
        "flora int8 sign κ=1000, residual=false": [(1, 3.65)],
    }
    assert [(point.label, point.bytes) for point in found.rivals] == [("adamw", 8), ("sinkgd", 0)]
    assert [point.label for point in found.lines] == ["flora-none", "flora-full"]
    assert found.rivals[0].spread == pytest.approx(0.5 / 2**0.5)


def test_the_picture_has_room_for_no_state_at_all() -> None:
    found = picture(
        [best("flora", 3.0, 200), best("flora-none", 5.0, 1), best("adamw", 3.1, 800), best("sinkgd", 3.1, 0)]
    )
    (axes,) = state_figure(found, "A job").axes
    left, right = axes.get_xlim()
    assert left < 0 < 8 < right
    labels = {text.get_text(): text for text in axes.texts}
    assert labels.keys() == {"adamw", "sinkgd"}
    lines = [line.get_ydata()[0] for line in axes.lines if len(set(line.get_xdata())) == 2]
    assert 5.25 in lines


def drawn(folder: Path, state: int, gathered: int = 0, **options: Any) -> Best:
    """A row whose run has lost little in three steps."""
    folder.mkdir()
    metrics = [{"step": 0, "validation_loss": 7.0}, {"step": 1, "loss": 7.0}, {"step": 2, "loss": 5.0}]
    metrics += [{"step": 3, "loss": None}, {"step": 3, "validation_loss": 4.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    summary = {"validation_loss": 4.0, "optimizer_state_bytes": state, "accumulation_bytes": gathered}
    return Best(RunConfig.resolve(**options), folder, (0,), [summary], [])


def test_the_bars_are_the_bytes_and_the_lines_the_losses(tmp_path: Path) -> None:
    sizes = {"flora": 430_460, "adamw": 16_919_160}
    rows = [drawn(tmp_path / name, size, optimizer=name) for name, size in sizes.items()]
    losses, bars = comparison_figure(rows, "title").axes
    assert [bar.get_height() for bar in bars.patches] == [0.43046, 16.91916]
    assert [label.get_text() for label in losses.get_legend().get_texts()] == ["flora", "adamw"]
    dotted = [line for line in losses.lines if line.get_marker() == "o"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in dotted] == [([0, 3], [7.0, 4.0])] * 2


def test_gathered_gradients_stand_on_the_state(tmp_path: Path) -> None:
    ways = {"exact": 8_000_000, "flora": 1_000_000}
    rows = [drawn(tmp_path / way, 500_000, size, accumulate=2, accumulator=way) for way, size in ways.items()]
    losses, bars = comparison_figure(rows, "title").axes
    assert [(bar.get_y(), bar.get_height()) for bar in bars.patches] == [(0, 0.5), (0, 0.5), (0.5, 8), (0.5, 1)]
    assert [text.get_text() for text in bars.texts] == ["8.5 MB", "1.5 MB"]
    assert [line.get_linestyle() for line in losses.lines if line.get_marker() == "o"] == ["--", "-"]


def test_differences_are_paired_by_validation_block(texts: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    flora, adamw = done(plan(texts, "flora", "adamw", seeds=(0, 1)), out)["rows"]
    blocks = {
        name: [read_json(path / "summary.json")["block_losses"] for path in (out / "runs").glob(f"{name}-*")]
        for name in ("flora", "adamw")
    }
    means = {name: [mean(block) for block in zip(*losses, strict=True)] for name, losses in blocks.items()}
    assert flora["standard_error"] == pytest.approx(stdev(means["flora"]) / 4**0.5)
    paired = [one - other for one, other in zip(means["flora"], means["adamw"], strict=True)]
    assert flora["difference"] == flora["validation_loss"] - adamw["validation_loss"]
    assert flora["difference"] == pytest.approx(mean(paired), abs=1e-6)
    assert flora["difference_standard_error"] == pytest.approx(stdev(paired) / 4**0.5)
    assert flora["difference_standard_error"] < flora["standard_error"]
    assert (adamw["difference"], adamw["difference_standard_error"]) == (None, None)
    text = (out / "table.md").read_text()
    assert f"| {flora['standard_error']:.4f} | {difference(flora)} |" in text
    assert "- validated on 4 of " in text


def test_a_difference_in_words() -> None:
    assert difference({"difference": -0.0287, "difference_standard_error": 0.0083}) == "−0.0287 ± 0.0083"
    assert difference({"difference": 0.5, "difference_standard_error": None}) == "+0.5000"


def test_sketches_are_compared_in_several_dtypes(texts: Path) -> None:
    ways = {"accumulators": ("exact", "flora"), "accumulator_dtypes": ("int8", "int4")}
    made = plan(texts, "flora", "adamw", **ways, options={"batch_size": 1, "accumulate": 2})
    labels = [made.settings(row)[0].label for row in made.rows]
    assert labels == [
        f"{name}, {way}"
        for name in ("flora", "adamw")
        for way in ("exact gradients", "sketched gradients (int8)", "sketched gradients (int4)")
    ]
    usual = plan(texts, "flora", "adamw", accumulator_dtypes=("int8", "int4"), options={"accumulate": 2})
    assert [(row.contestant["optimizer"], row.contestant.get("accumulator_dtype")) for row in usual.rows] == [
        ("flora", "int8"),
        ("flora", "int4"),
        ("adamw", None),
    ]


def test_ways_to_gather_gradients_are_compared(texts: Path, tmp_path: Path, here: Here) -> None:
    gathering = {"batch_size": 1, "accumulate": 3, "accumulator_dtype": "float32"}
    made = plan(texts, "flora", "adamw", accumulators=("exact", "flora", "none"), options=gathering)
    out = tmp_path / "out"
    rows = {(row["optimizer"], row["accumulator"]): row for row in done(made, out)["rows"]}
    assert list(rows) == [(name, way) for name in ("flora", "adamw") for way in ("exact", "flora", "none")]
    for name in ("flora", "adamw"):
        exact, sketched, none = (rows[name, way] for way in ("exact", "flora", "none"))
        # At float32 and a ratio of 1 a sketch is the exact sum.
        assert sketched["validation_loss"] == pytest.approx(exact["validation_loss"], rel=1e-5)
        assert sketched["accumulation_bytes"] == exact["accumulation_bytes"] > 0
        assert none["accumulation_bytes"] == 0
        assert none["validation_loss"] != pytest.approx(exact["validation_loss"], rel=1e-5)
    lines = (out / "table.md").read_text().splitlines()
    assert lines[2].startswith("| flora, exact gradients | ")
    assert cells(lines, 4)["gathered gradients"] == "–"
    tokens = {path.name: RunFolder.open(path).metrics()[-1]["tokens"] for path in (out / "runs").iterdir()}
    assert {name.split("-")[1]: count for name, count in tokens.items()} == {"exact": 144, "flora": 144, "none": 48}


def test_a_run_of_a_comparison_is_the_run_itself(texts: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    done(plan(texts, "adafactor"), out)
    (path,) = (out / "runs").iterdir()
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "loss.png",
        "manifest.json",
        "metrics.jsonl",
        "summary.json",
    ]
    alone = run(fast_config(texts, optimizer="adafactor", steps=3), tmp_path / "alone")
    assert timeless(RunFolder.open(path)) == timeless(alone)


def test_finished_runs_are_not_done_again(texts: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    made = plan(texts, "adamw", "adafactor", lrs=(1e-3, 2e-3))
    begin(made, out)
    here.stop_before = 3
    with pytest.raises(StoppedError):
        compare(out, Console(quiet=True))
    assert [row["label"] for row in read_json(out / "table.json")["rows"]] == ["adamw"]
    assert (out / "state.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    assert len(before) == 3
    here.stop_before = None
    compare(out, Console(quiet=True))
    assert len(here.titles) == made.runs == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    table = (out / "table.md").read_text()
    compare(out, Console(quiet=True))
    assert len(here.titles) == 4
    assert (out / "table.md").read_text() == table


def test_what_diverges_loses(texts: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    options = {"max_grad_norm": 0.0, "warmup_steps": 1, "steps": 5}
    table = done(plan(texts, "adamw", lrs=(1e30, 1e-3), seeds=(0, 1), options=options), out)
    (row,) = table["rows"]
    assert row["lr"] == 1e-3
    assert [tried["validation_loss"] is None for tried in table["grid"]] == [True, False]
    assert len(here.titles) == 3
    assert "| adamw | 1e+30 | 1e+31 | diverged |" in (out / "table.md").read_text()


def test_a_comparison_where_all_diverge_still_says_so(texts: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    options = {"max_grad_norm": 0.0, "warmup_steps": 1, "steps": 5}
    table = done(plan(texts, "adamw", lrs=(1e30,), seeds=(0, 1), options=options), out)
    (row,) = table["rows"]
    assert row["validation_loss"] is None
    assert not (out / "comparison.png").exists()
    assert "| adamw | 1e+30 | 1e+31 | diverged | – |" in (out / "table.md").read_text()


def test_a_plan_is_read_as_it_was_written(texts: Path, tmp_path: Path) -> None:
    made = plan(texts, "flora", lrs=(1e-3,), options={"rank": 8})
    begin(made, tmp_path / "out")
    assert Plan.load(tmp_path / "out") == made


def test_rows_are_added_and_finished_runs_are_kept(texts: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    before = done(plan(texts, "flora", "adamw", lr_factors=(1.0, 2.0)), out)
    extend(out, {"methods": ("flora",), "set": ("ratio=2",)}, "second")
    extend(out, {"methods": ("adamw",), "lrs": (1e-3, 3e-3)}, "third")
    assert [grid.lr_factors for grid in Plan.load(out).grids] == [(1.0, 2.0), (1.0, 2.0), None]
    here.titles.clear()
    compare(out, Console(quiet=True))
    table = read_json(out / "table.json")
    assert [title.split()[1] for title in here.titles] == [
        "adamw-lr0.003-embedding0.03-seed0",
        "flora-ratio=2-lr0.001-embedding0.01-seed0",
        "flora-ratio=2-lr0.002-embedding0.02-seed0",
    ]
    assert here.titles[0].startswith("4/6 ")
    assert [row["label"] for row in table["rows"]] == ["flora", "adamw", "flora ratio=2"]
    assert table["rows"][0]["validation_losses"] == before["rows"][0]["validation_losses"]
    assert [tried["lr"] for tried in table["grid"]] == [1e-3, 2e-3, 1e-3, 3e-3, 1e-3, 2e-3]
    assert table["commands"] == ["floragrad compare", "second", "third"]


def test_a_row_with_other_seeds_says_so(texts: Path, tmp_path: Path, here: Here) -> None:
    out = tmp_path / "out"
    done(plan(texts, "flora", "flora-none"), out)
    extend(out, {"methods": ("adamw",), "seeds": (0, 1)}, "more")
    compare(out, Console(quiet=True))
    assert "seed(s) 0; adamw: 0, 1;" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("adamw",), "set": ("ratio=2",)}, "--set ratio belongs to flora"),
        ({"methods": ("flora",), "set": ("ratio=0",)}, "ratio"),
        ({"seeds": (1, 1)}, "--seeds 1,1 names one twice"),
    ],
)
def test_impossible_rows_change_nothing(texts: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    out = tmp_path / "out"
    begin(plan(texts, "flora"), out)
    before = tree(out)
    with pytest.raises(UserError, match=message):
        extend(out, changes, "more")
    assert tree(out) == before


def test_a_damaged_addition_is_refused(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(plan(texts, "flora"), out)
    extend(out, {"methods": ("adamw",)}, "more")
    added = out / "added-1.json"
    for content in ("{", "[]", '{"methods": ["adamw"], "rows": 1, "command": ""}'):
        added.write_text(content)
        with pytest.raises(UserError, match=r"added-1\.json is damaged .* delete it with its rows"):
            compare(out, Console(quiet=True))


def test_another_comparison_is_never_written_over(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(plan(texts, "flora"), out)
    before = tree(out)
    with pytest.raises(UserError, match="holds another run: continue that one with floragrad compare --resume"):
        begin(plan(texts, "adamw"), out)
    with pytest.raises(UserError, match="holds another run"), new_folder(out):
        pass
    assert tree(out) == before


def test_a_worker_that_fails_is_named(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    begin(plan(texts, "adamw"), out)
    monkeypatch.setattr(worker.sys, "executable", "false")
    with pytest.raises(UserError, match=r"adamw-lr.* ended with exit code 1, .* floragrad compare --resume"):
        compare(out, Console(quiet=True))
    assert not (out / "table.md").exists()


def test_the_command_makes_a_table_and_a_picture(
    texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    fast = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]
    assert command("compare", "--methods", "flora", "--text", texts, "--out", out, *fast) == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert "1/1 flora-lr" in said.out
    (row,) = read_json(out / "table.json")["rows"]
    assert f"{row['validation_loss']:.4f}" in said.out
    assert (out / "comparison.png").is_file()
