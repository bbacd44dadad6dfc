"""The results in words: cells of tables, and the page of Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.step.goals import goal_cells
from benchmarks.step.machine import threads_in_words
from benchmarks.step.measure import WARM_UP
from benchmarks.step.optimizers import ALL, FUSED
from benchmarks.step.shapes import LAYERS
from floragrad._text import format_bytes

Cells = list[tuple[str, ...]]
TITLES: Final = {
    "tables": "A step",
    "epochs": "The step that opens an epoch",
    "sizes": "Growth over the model's size",
    "ranks": "Growth over the rank",
}
ABOUT: Final = (
    "Every optimizer is a process of its own with the same parameters and gradients. In each round every one makes a "
    "step, in a new order, while the others sleep. *Ratio*: the median over rounds of its time to that of "
    f"{FUSED} in the same round, with the quartiles; milliseconds are shown, and are no claim. *First*: the first "
    "step, which makes state and compiles, from an empty cache; it is not among the measured ones, nor are the "
    f"{WARM_UP - 1} after it. *State*: what is kept between steps. *Peak*: what a step takes on top of that, seen by a "
    "dispatch mode in a step that is not timed, in bytes and in units of the largest tensor in float32; what a kernel "
    "takes inside itself is not seen, and of compiled steps nothing is: —. Every process has taken and given back "
    "30 MB once, as training does: until then the C library returns freed memory to the system, and takes it again."
)


def time_cells(run: Mapping[str, Any]) -> Cells:
    """The table of step times of one run."""
    found: Cells = [("optimizer", "ratio", "quartiles", "ms", "steps", "first, s", "state", "peak", "of largest")]
    for row in run["rows"]:
        name = f"{row['name']} ({row['shapes']})" if row["shapes"] != run["shapes"] else row["name"]
        note = ALL[row["name"]].note
        peak = row["peak_bytes"]
        found.append(
            (
                f"{name}; {note}" if note else name,
                _number(row.get("ratio"), 2),
                _spread(row.get("quartiles"), 2),
                _number(row.get("median_ms"), 1),
                str(row["steps"]),
                _number(row["first_seconds"], 2),
                _bytes(row["state_bytes"]),
                _bytes(peak),
                _number(None if peak is None else peak / run["largest_bytes"], 2),
            )
        )
    return found


def epoch_cells(run: Mapping[str, Any]) -> Cells:
    """The table of epochs: the step that opens one over the ordinary one of the same optimizer."""
    found: Cells = [("optimizer", "ratio", "quartiles", "opening, ms", "ordinary, ms", "epochs")]
    for row in run["rows"]:
        if row["name"] != FUSED:
            found.append(
                (
                    row["name"],
                    _number(row.get("epoch_ratio"), 2),
                    _spread(row.get("epoch_quartiles"), 2),
                    _number(row.get("epoch_ms"), 1),
                    _number(row.get("ordinary_ms"), 1),
                    str(row.get("epochs", "—")),
                )
            )
    return found


def cells(run: Mapping[str, Any]) -> Cells:
    """The table of any run."""
    return epoch_cells(run) if run["part"] == "epochs" else time_cells(run)


def troubles(run: Mapping[str, Any]) -> list[str]:
    """What did not run, or not to the end, and why."""
    return [f"{row['name']}: {row['trouble']}" for row in run["rows"] if row["trouble"]]


def heading(run: Mapping[str, Any]) -> str:
    """What a run is about."""
    return f"{TITLES[run['part']]}: {run['shapes']}, {run['dtype']}, {threads_in_words(run['threads'])}"


def markdown(results: Mapping[str, Any], picture: str | None = None) -> str:
    """The page of results.

    Args:
        results: All of them.
        picture: The file name of the picture of growth, where there is one.
    """
    lines = ["# What a step costs", "", ABOUT, ""]
    of_layers = [run for run in results["runs"] if run["shapes"] == LAYERS]
    if of_layers:
        threads = threads_in_words(max(run["threads"] for run in of_layers))
        lines += ["## Goals", "", f"GPT-2 small's layers, float32 parameters, {threads}, rank 128.", ""]
        lines += [*_table(goal_cells(results)), ""]
    for run in results["runs"]:
        lines += [f"## {heading(run)}", ""]
        counts = run["parameters"] / 1e6, run["largest_bytes"] / 4e6, run["busy_cores"]
        words = "{:.1f}M numbers, {:.2f}M in the largest tensor; {:.2f} cores were busy before it began."
        lines += [words.format(*counts), ""]
        lines += [*_table(cells(run)), ""]
        listed = troubles(run)
        if listed:
            lines += [*(f"- {_escaped(each)}" for each in listed), ""]
    if picture is not None:
        lines += [f"![Step time and state over size and rank]({picture})", ""]
    return "\n".join([*lines, *_machine(results["about"]), ""])


def _machine(about: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return [
        f"- `{about['command']}`, at commit {about['commit']}",
        f"- {about['processor']}, {about['cores']} cores, {format_bytes(about['memory_bytes'])} of memory, "
        f"{about['system']}",
        f"- {versions}",
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *body = ("| " + " | ".join(map(_escaped, row)) + " |" for row in rows)
    return [header, "|" + " --- |" * len(rows[0]), *body]


def _escaped(text: str) -> str:
    """On one line, and without the sign that ends a cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: float | None, digits: int) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def _spread(values: Sequence[float] | None, digits: int) -> str:
    return "—" if values is None else f"{values[0]:.{digits}f} – {values[1]:.{digits}f}"


def _bytes(count: int | None) -> str:
    return "—" if count is None else format_bytes(count)
