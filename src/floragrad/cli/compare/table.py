"""The table of a comparison, for people and for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from floragrad._text import format_bytes
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.measures import format_measure, measure_name, measures_of
from floragrad.cli.train.recorder import standard_error
from floragrad.cli.train.tasks import TASKS

NOTHING = "–"
"""A cell without a value."""
VOCABULARIES = {
    "shared": "the embedding, the output head and the vectors are trained by Flora's defaults in every row",
    "own": "every method trains the embedding, the output head and the vectors itself",
}


@dataclass(frozen=True)
class Best:
    """One method's best setting, and everything that was tried for it.

    Attributes:
        config: The setting, with the first seed.
        first_run: The folder of its run with the first seed.
        seeds: The seeds it was run with.
        summaries: Its summaries, one a seed; only the first where that one diverged.
        grid: Every setting that was tried on the first seed, and its summary.
        remedy: The command that installs the method's package; empty where it is installed.
    """

    config: RunConfig
    first_run: Path
    seeds: tuple[int, ...]
    summaries: list[dict[str, Any]]
    grid: list[tuple[RunConfig, dict[str, Any]]]
    remedy: str = ""

    @property
    def optimizer(self) -> str:
        """The method's name."""
        return self.config.optimizer

    @property
    def label(self) -> str:
        """The method with its settings, and how gradients are gathered."""
        return self.config.label

    @property
    def title(self) -> str:
        """The job in a few words."""
        config = self.config
        batches = "" if config.accumulate == 1 else f" in {config.accumulate} micro-batches"
        count = config.units_per_step // config.micro_batches * config.accumulate
        return f"{config.job}, {config.steps} steps of {count:,} {config.unit}{batches}"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of the run with the first seed."""
        return RunFolder(self.first_run).metrics()

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The summaries of the seeds that did not diverge."""
        return [summary for summary in self.summaries if summary["validation_loss"] is not None]

    @property
    def losses(self) -> list[float]:
        """The validation losses of the seeds that did not diverge."""
        return [summary["validation_loss"] for summary in self.finished]

    @property
    def loss(self) -> float | None:
        """Mean of the validation losses; None if a seed diverged or nothing was run."""
        return mean(self.losses) if 0 < len(self.losses) == len(self.summaries) else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds; None of a single one."""
        return stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def block_losses(self) -> list[float]:
        """The loss of each validation block, averaged over the seeds; empty where a run did not record them."""
        blocks = [summary.get("block_losses") or [] for summary in self.finished]
        return [fmean(block) for block in zip(*blocks, strict=True)] if all(blocks) else []

    @property
    def about(self) -> dict[str, Any]:
        """A summary, with what is the same for all seeds."""
        return self.finished[0]

    @property
    def bytes_per_hidden_parameter(self) -> float | None:
        """Measured bytes of the hidden matrices' state per element of theirs; None of runs of earlier versions."""
        about = self.about
        return about["hidden_state_bytes"] / about["hidden_parameters"] if about.get("hidden_parameters") else None

    @property
    def step_seconds(self) -> float:
        """The median time of a step, averaged over the seeds."""
        return float(mean(summary["step_seconds"] for summary in self.finished))


def as_json(bests: Sequence[Best], commands: Sequence[str]) -> dict[str, Any]:
    """Return the table as numbers, with the commands that made it."""
    baseline = _baseline(bests)
    return {
        "commands": list(commands),
        "rows": [_row(best, baseline) for best in bests],
        "grid": [
            {
                "optimizer": config.optimizer,
                "accumulator": config.accumulator,
                "label": config.label,
                "lr": config.lr,
                "embedding_lr": config.embedding_lr,
                "seed": config.seed,
                "validation_loss": summary["validation_loss"],
            }
            for best in bests
            for config, summary in best.grid
        ],
        "step_time_of": baseline.label if baseline else None,
        "machine": baseline.about["machine"] if baseline else None,
        "versions": baseline.about["versions"] if baseline else None,
    }


def _baseline(bests: Sequence[Best]) -> Best | None:
    """Whose step time is 1: AdamW's, or the first one's that did not diverge."""
    finished = [best for best in bests if best.loss is not None]
    return next((best for best in finished if best.optimizer == "adamw"), finished[0] if finished else None)


def _row(best: Best, baseline: Best | None) -> dict[str, Any]:
    row = {
        "task": best.config.task,
        "optimizer": best.optimizer,
        "accumulator": best.config.accumulator,
        "label": best.label,
        "lr": best.config.lr,
        "embedding_lr": best.config.embedding_lr,
        "seeds": list(best.seeds),
        "validation_losses": [summary["validation_loss"] for summary in best.summaries],
        "validation_loss": best.loss,
    }
    if best.remedy:
        row["remedy"] = best.remedy
    if best.loss is None or baseline is None:
        return row
    return {
        **row,
        "validation_loss_min": min(best.losses),
        "validation_loss_max": max(best.losses),
        "validation_loss_stdev": best.spread,
        "validation_blocks": len(best.block_losses),
        "held_out_blocks": best.about.get("held_out_blocks"),
        "standard_error": standard_error(best.block_losses),
        **_difference(best, baseline),
        **{name: fmean(each[name] for each in best.finished) for name in measures_of(best.about)},
        "bytes_per_hidden_parameter": best.bytes_per_hidden_parameter,
        "optimizer_state_bytes": best.about["optimizer_state_bytes"],
        "state_of_adamw": best.about["optimizer_state_bytes"] / best.about["adamw_state_bytes"],
        "accumulation_bytes": best.about["accumulation_bytes"],
        "peak_memory_bytes": max(summary["peak_memory_bytes"] for summary in best.finished),
        "step_seconds": best.step_seconds,
        "step_time_ratio": best.step_seconds / baseline.step_seconds,
    }


def _difference(best: Best, baseline: Best) -> dict[str, Any]:
    """Return the loss beyond the baseline's, and the standard error of the differences block by block."""
    if best is baseline or best.loss is None or baseline.loss is None:
        return {"difference": None, "difference_standard_error": None}
    pairs = zip(best.block_losses, baseline.block_losses, strict=True)
    error = standard_error([one - other for one, other in pairs])
    return {"difference": best.loss - baseline.loss, "difference_standard_error": error}


def _seeds(bests: Sequence[Best]) -> str:
    """Name the seeds of most rows, and the rows that have others."""
    written = [", ".join(map(str, best.seeds)) for best in bests]
    most = max(written, key=written.count)
    others = [f"{best.label}: {each}" for best, each in zip(bests, written, strict=True) if each != most]
    return "; ".join([f"seed(s) {most}", *others])


def as_markdown(bests: Sequence[Best], numbers: Mapping[str, Any]) -> str:
    """Return the table in Markdown, from the output of :func:`as_json`, with its settings below it."""
    of, config = numbers["step_time_of"] or "adamw", bests[0].config
    rows = _cells(numbers["rows"])
    named = {"minus": f"minus {of}'s", "step time": f"step time / {of}'s"}
    lines = [*_table([named.get(head, head) for head in rows[0]], [list(row.values()) for row in rows]), ""]
    lines += [
        f"- {bests[0].title}; {_seeds(bests)}; {config.dtype}; the loss is the mean ± standard deviation over the "
        "seeds, the state is measured from its tensors; adapters count as state",
        f"- {VOCABULARIES[config.vocabulary]}",
        *[f"- {line}" for line in validation_notes(numbers["rows"], of)],
        *[f"- `{command}`" for command in numbers["commands"]],
    ]
    if numbers["machine"] is not None:
        versions = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items())
        lines.append(f"- {numbers['machine']}; {versions}")
    heads = ["method", "lr", "embedding lr", f"validation loss, seed {config.seed}"]
    grid = [[*_setting(tried).values(), _number(tried["validation_loss"])] for tried in numbers["grid"]]
    return "\n".join([*lines, "", "Everything that was tried:", "", *_table(heads, grid)]) + "\n"


def show(console: Console, rows: Sequence[Mapping[str, Any]], baseline: str | None) -> None:
    """Show the table of a comparison, as wide as a terminal."""
    minus, step = ("difference", "step time") if baseline is None else (f"minus {baseline}'s", f"step / {baseline}'s")
    named = {
        **{"method": "method", "rates": "lr, embedding", "validation loss": "validation loss", "minus": minus},
        **{measure_name(name): measure_name(name) for name in _measured(rows)},
        **{"state / hidden parameter": "state / hidden", "optimizer state": "state"},
        **{"gathered gradients": "gradients kept", "step time": step},
    }
    table = Table()
    for head in named.values():
        table.add_column(head, justify="left" if head == "method" else "right")
    for cells in _cells(rows):
        cells["rates"] = f"{cells['lr']}, {cells['embedding lr']}"
        table.add_row(*(cells[name] for name in named))
    console.print(table)
    for line in validation_notes(rows, baseline or "adamw"):
        console.print(line, soft_wrap=True, highlight=False)


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the measures that any row has."""
    return list({name: None for row in rows for name in measures_of(row)})


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return each row's cells by the names of their columns."""
    measures = {name: measure_name(name) for name in _measured(rows)}
    columns = [
        *("method", "lr", "embedding lr", "validation loss", "min – max", "error over blocks", "minus"),
        *measures.values(),
        *("state / hidden parameter", "optimizer state", "of AdamW's", "gathered gradients", "peak memory"),
        "step time",
    ]
    found = []
    for row in rows:
        cells = {**dict.fromkeys(columns, NOTHING), **_setting(row)}
        if row["validation_loss"] is None:
            cells["validation loss"] = f"not installed: {row['remedy']}" if "remedy" in row else "diverged"
        else:
            spread, error, state = (
                row[name] for name in ("validation_loss_stdev", "standard_error", "bytes_per_hidden_parameter")
            )
            cells |= {
                "validation loss": _number(row["validation_loss"]) + ("" if spread is None else f" ± {spread:.4f}"),
                "min – max": f"{row['validation_loss_min']:.4f} – {row['validation_loss_max']:.4f}",
                "error over blocks": NOTHING if error is None else _number(error),
                "minus": difference(row),
                **{head: format_measure(name, row[name]) for name, head in measures.items()},
                "state / hidden parameter": NOTHING if state is None else f"{state:.3g} B",
                "optimizer state": format_bytes(row["optimizer_state_bytes"]),
                "of AdamW's": f"{100 * row['state_of_adamw']:.1f}%",
                "gathered gradients": format_bytes(row["accumulation_bytes"]) if row["accumulation_bytes"] else NOTHING,
                "peak memory": format_bytes(row["peak_memory_bytes"]),
                "step time": f"{row['step_time_ratio']:.2f}",
            }
        found.append(cells)
    return found


def _setting(row: Mapping[str, Any]) -> dict[str, str]:
    return {"method": row["label"], "lr": f"{row['lr']:g}", "embedding lr": f"{row['embedding_lr']:g}"}


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def difference(row: Mapping[str, Any]) -> str:
    """Return a row's loss beyond the baseline's, ± its standard error over the validation blocks."""
    if row["difference"] is None:
        return NOTHING
    error = row["difference_standard_error"]
    sign = "−" if row["difference"] < 0 else "+"
    return f"{sign}{abs(row['difference']):.4f}" + ("" if error is None else f" ± {error:.4f}")


def validation_notes(rows: Sequence[Mapping[str, Any]], of: str) -> list[str]:
    """Describe the blocks that the losses were measured on, and their errors."""
    row = next((row for row in rows if row.get("validation_blocks")), None)
    if row is None:
        return []
    task = TASKS[row["task"]]
    return [
        f"validated on {row['validation_blocks']:,} of {row['held_out_blocks']:,} {task.blocks}, drawn from "
        f"{task.everything}, the same for all",
        "error over blocks: the standard error of the loss for the choice of blocks, which all share; of what is "
        f"minus {of}'s: of the differences block by block",
    ]
