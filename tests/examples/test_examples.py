"""Every example and the notebook run, in a few steps, and the loss falls."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "flora_in_ten_minutes.ipynb"
EXTRA = {"trl_sft_lora": "trl", "unet_diffusion": "diffusers"}
"""Packages that no command of floragrad needs: where one is missing, its example is not run."""


def losses(printed: str) -> list[float]:
    """The losses that an example has printed, in their order."""
    return [float(value) for value in re.findall(r"\bloss ([\d.]+)", printed)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.usefixtures("restored_process", "unoptimized")
def test_an_example_trains(path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    if path.stem in EXTRA:
        pytest.importorskip(EXTRA[path.stem], reason="python -m pip install '.[dev]' brings it")
    monkeypatch.setattr(sys, "argv", [path.name, "--steps", "4"])
    monkeypatch.setenv("CI", "true")  # or TRL reports its use
    runpy.run_path(str(path), run_name="__main__")
    found = losses(capfd.readouterr().out)
    assert len(found) >= 2
    assert found[-1] < found[0]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_needs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 80
    assert re.match(r'"""[^"]+^Shows [^"]+^Needs [^"]+"""', text, flags=re.MULTILINE)


def test_the_page_lists_them_all() -> None:
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(\.\./examples/([^)]+)\)", page)) == {path.name for path in (*SCRIPTS, NOTEBOOK)}


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells in order, in one namespace, with fewer steps; no outputs are stored that could be wrong."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    assert sum("STEPS, LENGTH, BATCH, WIDTH, RANK = 80, 64, 16, 192, 24" in cell for cell in code) == 1
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(code, start=1):
        shorter = cell.replace("= 80, 64, 16, 192, 24", "= 8, 64, 8, 64, 8").replace(
            "draws = torch.randn(512), 64, 400", "draws = torch.randn(512), 64, 50"
        )
        exec(compile(shorter, f"cell {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    for name in ("AdamW", "Flora"):
        first, last = map(float, re.findall(rf"{name}: loss ([\d.]+) → ([\d.]+)", printed)[0])
        assert last < first


def test_the_notebooks_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((\.\./[^)#]+)", NOTEBOOK.read_text(encoding="utf-8")):
        assert (EXAMPLES / target).exists(), target
