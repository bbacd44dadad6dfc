"""Imports go one way: from a command to what it is built on."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import floragrad

SOURCE = Path(floragrad.__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (SOURCE / "floragrad").rglob("*.py")
}
ROOT = (
    *("app", "disk", "errors", "figures", "hub"),
    *("machine", "methods", "options", "peers", "presets", "rivals"),
)
"""What the commands share."""


def imported(module: str) -> set[str]:
    """The modules that one imports anywhere, in functions and for its types too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name in MODULES and name != module}


def test_there_are_no_cycles() -> None:
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    TopologicalSorter({name: imported(name) - packages for name in MODULES}).prepare()


def test_the_commands_import_downwards() -> None:
    """The root of ``cli`` knows no command, training knows no comparison, and the plan knows neither."""
    for module in MODULES:
        above = {
            **{f"floragrad.cli.{name}": ("train", "compare", "plan") for name in ROOT},
            **dict.fromkeys(["floragrad.cli.train"], ("compare", "plan")),
            **dict.fromkeys(["floragrad.cli.compare"], ("plan",)),
            **dict.fromkeys(["floragrad.cli.plan"], ("train", "compare")),
        }
        package = ".".join(module.split(".")[:3])
        for name in above.get(package, ()):
            assert not [each for each in imported(module) if each.startswith(f"floragrad.cli.{name}")], module


def test_the_libraries_know_no_command() -> None:
    for module in MODULES:
        if module.startswith(("floragrad.torch", "floragrad.jax")):
            assert not [each for each in imported(module) if each.startswith("floragrad.cli")], module
