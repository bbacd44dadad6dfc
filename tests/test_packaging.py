"""What an installation is made of: the pinned versions, and the archive of the sources."""

import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import floragrad

ROOT = Path(__file__).parents[1]
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
OLDEST, USUAL = "3.10", "3.11"


def pins(python: str) -> dict[str, str]:
    """The pinned versions that hold with a version of Python."""
    held = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    versions = {pin.name.lower(): str(pin.specifier).removeprefix("==") for pin in held}
    assert len(versions) == len(held), "a package is pinned once"
    return versions


@pytest.mark.parametrize("python", [OLDEST, USUAL])
def test_pinned_versions_are_for_the_python_that_they_are_pinned_for(python: str) -> None:
    """As far as they are installed here: their own metadata says which Python they need."""
    looked_at = 0
    for name, version in pins(python).items():
        try:
            found = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        if found["Version"].partition("+")[0] == version:
            looked_at += 1
            assert SpecifierSet(found["Requires-Python"] or "").contains(f"{python}.99"), (name, version)
    assert looked_at > 30


def test_every_package_is_pinned_for_the_oldest_python_unless_it_has_no_release_for_it() -> None:
    flax_needs = {"flax", "orbax-checkpoint", "tensorstore", "humanize", "etils", "treescope", "aiofiles", "uvloop"}
    site_needs = {"backrefs", "griffelib", "markdown", "platformdirs", "watchdog", "pymdown-extensions"} | {
        *("mkdocs-autorefs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python")
    }
    others = {"annotated-doc", "diffusers", "httpcore2", "httpx2", "importlib_metadata"}
    assert set(pins(USUAL)) - set(pins(OLDEST)) <= flax_needs | site_needs | others


def test_the_archive_of_the_sources_has_docs_tests_and_benchmarks(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="building needs it; pip installs it for every build")
    command = ["setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("src", "dev", "docs", "examples", "tests", "benchmarks", "replication")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".ipynb", ".md", ".png", ".svg", ".json", ".cpp", ".hpp", ".typed")
    }
    assert len(wanted) > 200
    assert wanted <= packed
    assert {
        "Makefile",
        "constraints.txt",
        "mkdocs.yml",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "README.md",
        "SECURITY.md",
    } <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


def test_the_version_stands_alike_wherever_it_is_written() -> None:
    """``_version.py`` is read by the build; the others are written by hand."""
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CITATION.cff", "CHANGELOG.md", "README.md")}
    assert f"\nversion: {floragrad.__version__}\n" in pages["CITATION.cff"]
    assert pages["CHANGELOG.md"].startswith(f"# Changes\n\n## {floragrad.__version__}")
    assert f"version {floragrad.__version__}." in pages["README.md"]
