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
    def title(self) -> str:
        """The job in a few words."""
        config = self.config
        batches = "" if config.accumulate == 1 else f" in {config.accumulate} micro-batches"
        count = config.units_per_step // config.micro_batches * config.accumulate
        return f"{config.job}, {config.steps} steps of {count:,} {config.unit}{batches}"

    @property
    def losses(self) -> list[float]:
        """The validation losses of the seeds that did not diverge."""
        return [summary["validation_loss"] for summary in self._finished]

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
        blocks = [summary.get("block_losses") or [] for summary in self._finished]
        return [fmean(block) for block in zip(*blocks, strict=True)] if all(blocks) else []

    @property
    def measures(self) -> dict[str, float]:
        """The task's measures beside the loss, averaged over the seeds."""
        found = [measures_of(summary) for summary in self._finished]
        return {name: fmean(each[name] for each in found) for name in found[0]}

    @property
    def state_bytes(self) -> int:
        """Measured bytes of the optimizer's state."""
        return int(self._finished[0]["optimizer_state_bytes"])

    @property
    def bytes_per_hidden_parameter(self) -> float | None:
        """Measured bytes of the hidden matrices' state per element of theirs; None of runs of earlier versions."""
        about = self.about
        return about["hidden_state_bytes"] / about["hidden_parameters"] if about.get("hidden_parameters") else None

    @property
    def accumulation_bytes(self) -> int:
        """Bytes that the gradients of earlier micro-batches take."""
        return int(self._finished[0]["accumulation_bytes"])

    @property
    def adamw_bytes(self) -> int:
        """Bytes of AdamW's state for the same parameters."""
        return int(self._finished[0]["adamw_state_bytes"])

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that any of the seeds used."""
        return max(int(summary["peak_memory_bytes"]) for summary in self._finished)

    @property
    def step_seconds(self) -> float:
        """The median time of a step, averaged over the seeds."""
        return float(mean(summary["step_seconds"] for summary in self._finished))

    @property
    def about(self) -> dict[str, Any]:
        """A summary with the machine and the versions."""
        return self._finished[0]

    @property
    def _finished(self) -> list[dict[str, Any]]:
        return [summary for summary in self.summaries if summary["validation_loss"] is not None]


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
        "step_time_of": baseline.config.label if baseline else None,
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
        "label": best.config.label,
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
        **best.measures,
        "bytes_per_hidden_parameter": best.bytes_per_hidden_parameter,
        "optimizer_state_bytes": best.state_bytes,
        "state_of_adamw": best.state_bytes / best.adamw_bytes,
        "accumulation_bytes": best.accumulation_bytes,
        "peak_memory_bytes": best.peak_memory_bytes,
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
    others = [f"{best.config.label}: {each}" for best, each in zip(bests, written, strict=True) if each != most]
    return "; ".join([f"seed(s) {most}", *others])


def as_markdown(bests: Sequence[Best], numbers: Mapping[str, Any]) -> str:
    """Return the table in Markdown, with its settings below it.

    Args:
        bests: Best setting of each method.
        numbers: Result of :func:`as_json`.
    """
    of, measured = numbers["step_time_of"] or "adamw", _measured(numbers["rows"])
    heads = [
        "method", "lr", "embedding lr", "validation loss", "min – max", "error over blocks", f"minus {of}'s",
        *map(measure_name, measured), "state / hidden parameter", "optimizer state", "of AdamW's",
        "gathered gradients", "peak memory", f"step time / {of}'s",
    ]  # fmt: skip
    config = bests[0].config
    lines = [*_table(heads, [_cells(row, measured) for row in numbers["rows"]]), ""]
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
    grid = [
        [
            tried["label"],
            f"{tried['lr']:g}",
            f"{tried['embedding_lr']:g}",
            _number(tried["validation_loss"]),
        ]
        for tried in numbers["grid"]
    ]
    heads = ["method", "lr", "embedding lr", f"validation loss, seed {config.seed}"]
    lines += ["", "Everything that was tried:", "", *_table(heads, grid)]
    return "\n".join(lines) + "\n"


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the measures that any row has."""
    return list({name: None for row in rows for name in measures_of(row)})


def _cells(row: dict[str, Any], measured: list[str]) -> list[str]:
    first = [row["label"], f"{row['lr']:g}", f"{row['embedding_lr']:g}"]
    if row["validation_loss"] is None:
        return [*first, _failure(row), *[NOTHING] * (9 + len(measured))]
    return [
        *first,
        _loss(row),
        f"{row['validation_loss_min']:.4f} – {row['validation_loss_max']:.4f}",
        NOTHING if row["standard_error"] is None else _number(row["standard_error"]),
        difference(row),
        *[format_measure(name, row[name]) for name in measured],
        _per_parameter(row),
        format_bytes(row["optimizer_state_bytes"]),
        f"{100 * row['state_of_adamw']:.1f}%",
        format_bytes(row["accumulation_bytes"]) if row["accumulation_bytes"] else NOTHING,
        format_bytes(row["peak_memory_bytes"]),
        f"{row['step_time_ratio']:.2f}",
    ]


def _failure(row: Mapping[str, Any]) -> str:
    return f"not installed: {row['remedy']}" if "remedy" in row else "diverged"


def _loss(row: Mapping[str, Any]) -> str:
    spread = row["validation_loss_stdev"]
    return _number(row["validation_loss"]) + ("" if spread is None else f" ± {spread:.4f}")


def _per_parameter(row: Mapping[str, Any]) -> str:
    found = row["bytes_per_hidden_parameter"]
    return NOTHING if found is None else f"{found:.3g} B"


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def show(console: Console, rows: list[dict[str, Any]], baseline: str | None) -> None:
    """Show the table of a comparison, as wide as a terminal."""
    table = Table()
    step = "step time" if baseline is None else f"step / {baseline}'s"
    minus = "difference" if baseline is None else f"minus {baseline}'s"
    measured = _measured(rows)
    heads = ["method", "lr, embedding", "validation loss", minus, *map(measure_name, measured)]
    for head in (*heads, "state / hidden", "state", "gradients kept", step):
        table.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        cells = [row["label"], f"{row['lr']:g}, {row['embedding_lr']:g}"]
        if row["validation_loss"] is None:
            table.add_row(*cells, _failure(row))
            continue
        sizes = (format_bytes(row["optimizer_state_bytes"]), format_bytes(row["accumulation_bytes"]))
        others = [format_measure(name, row[name]) for name in measured]
        cells += [_loss(row), difference(row), *others, _per_parameter(row), *sizes]
        table.add_row(*cells, f"{row['step_time_ratio']:.2f}")
    console.print(table)
    for line in validation_notes(rows, baseline or "adamw"):
        console.print(line, soft_wrap=True, highlight=False)


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
