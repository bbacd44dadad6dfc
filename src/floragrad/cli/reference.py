"""Print docs/options.md, the reference of all options: ``python -m floragrad.cli.reference > docs/options.md``."""

from collections.abc import Mapping

from floragrad.cli.compare.command import COMPARE_OPTIONS
from floragrad.cli.options import Option
from floragrad.cli.plan.command import PLAN_OPTIONS
from floragrad.cli.train.command import TRAIN_OPTIONS


def page() -> str:
    """Return the page."""
    commands = {"train": TRAIN_OPTIONS, "compare": COMPARE_OPTIONS, "plan": PLAN_OPTIONS}
    tables = [f"## floragrad {name}\n\n{_table(options)}" for name, options in commands.items()]
    return "\n".join(["# Options of the command line\n", *tables])


def _table(options: Mapping[str, Option]) -> str:
    lines = ["| option | value | default | meaning |", "| --- | --- | --- | --- |"]
    for each in options.values():
        name = each.placeholder if each.argument else f"`{each.flags}`"
        value = "" if each.argument or not each.placeholder else f"`{each.placeholder}`"
        cells = (name, value, each.words, each.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
