"""Every Python snippet of the README and the docs runs, page by page; every docstring's example too."""

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import floragrad
from dev.method_figure import figure

pytestmark = pytest.mark.usefixtures("unoptimized")

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALL_PAGES = [*sorted(ROOT.glob("*.md")), *PAGES[1:], *sorted((ROOT / "dev").glob("*.md"))]
COMPILED = "floragrad.torch.backends.cpu._"
TRAINERS = {"floragrad.axolotl", "floragrad.swift", "floragrad.torchtitan"}
"""Modules whose library is not in this environment; `make test-trainers` runs them."""
MODULES = [
    "floragrad",
    *(
        m.name
        for m in pkgutil.walk_packages(floragrad.__path__, "floragrad.")
        if not m.name.startswith(COMPILED) and m.name not in TRAINERS
    ),
]


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_there_are_snippets() -> None:
    assert len(snippets(ROOT / "README.md")) >= 3


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, snippet in enumerate(snippets(page), start=1):
        exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), namespace)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
        assert anchor in anchors(page.parent / target if target else page), (target, anchor)
    for path in re.findall(r"`((?:tests|src|benchmarks|docs)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for path, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{test}"


def messages() -> set[str]:
    """Every string of the sources, with … for what a formatted one fills in."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_messages_that_are_explained_are_those_of_the_sources() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `([^`]+)`(?: \||$)", page, flags=re.MULTILINE)
    assert len(explained) > 60
    known = messages()
    assert not [message for message in explained if not any(message in each for each in known)]


def test_the_figure_is_what_its_script_draws() -> None:
    """Where it is not: ``python -m dev.method_figure > docs/method.svg``."""
    assert (ROOT / "docs" / "method.svg").read_text(encoding="utf-8") == figure() + "\n"
