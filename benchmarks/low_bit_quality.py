"""What state in few bits costs in loss: the default job of ``floragrad train``, beside two 8-bit AdamWs.

    python -m benchmarks.low_bit_quality --out runs/low_bit

Needs torchao and bitsandbytes. Every run has a folder of its own and is done once: a stopped one is begun anew, the
finished ones are only read. ``--rows`` does some of the rows.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console

from benchmarks import quality
from benchmarks.step.machine import commit
from benchmarks.step.state import stored_bytes
from floragrad._text import format_bytes
from floragrad.cli import machine
from floragrad.cli.disk import write_text
from floragrad.cli.errors import DivergenceError, StoppedError
from floragrad.cli.peers import state_tensors
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.corpus import Corpus
from floragrad.cli.train.display import Display
from floragrad.cli.train.engine import Engine
from floragrad.cli.train.folder import CONFIG, CORPUS, RunFolder, new_folder
from floragrad.cli.train.processes import Processes
from floragrad.cli.train.run import start, train, write_corpus
from floragrad.cli.train.trainer import TrainerEngine

LRS, EMBEDDING_LR, SEEDS = (5e-4, 1e-3, 2e-3), 1e-2, (0, 1, 2)
JOB = {"embedding_lr": EMBEDDING_LR, "threads": 1, "eval_every": 500, "save_every": 1000, "keep_checkpoint": False}
"""The defaults, but for how often they look and save: only the end counts here."""


@dataclass(frozen=True)
class Row:
    """One way to keep optimizer state.

    Attributes:
        options: Of ``floragrad train``, beside :data:`JOB`.
        peer: The library whose ``optim.AdamW8bit`` takes the place of that optimizer; None: nothing does.
    """

    options: dict[str, str] = field(default_factory=dict)
    peer: str | None = None


ROWS = {
    **{f"Flora, {dtype}": Row({"state_dtype": dtype}) for dtype in ("float32", "bfloat16", "int8", "int4")},
    "AdamW": Row({"optimizer": "adamw"}),
    "bitsandbytes AdamW8bit": Row({"optimizer": "adamw"}, "bitsandbytes"),
    "torchao AdamW8bit": Row({"optimizer": "adamw"}, "torchao"),
}


class PeerEngine(TrainerEngine):
    """AdamW's run with the 8-bit AdamW of a library, on the same parameter groups and otherwise with its defaults."""

    def __init__(
        self, peer: str, config: RunConfig, folder: RunFolder, corpus: Corpus, step: int, processes: Processes
    ) -> None:
        super().__init__(config, folder, corpus, step, processes)
        self._peer = peer
        self.libraries = (*TrainerEngine.libraries, peer)

    def optimizer(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """The library's, with AdamW's groups."""
        _, settings = super().optimizer()
        kind = import_module(f"{self._peer}.optim").AdamW8bit
        return kind, {name: settings[name] for name in ("params", "lr")}

    @property
    def optimizer_state_bytes(self) -> int:
        """Measured from its tensors, as for the others."""
        return stored_bytes(list(state_tensors(self._optimizer)))


def starter(row: Row) -> Callable[..., Engine]:
    """What makes the engine of a row's runs."""
    peer = row.peer
    return start if peer is None else lambda *given: PeerEngine(peer, *given)


@dataclass(frozen=True)
class Found:
    """The summaries of a row: of each rate on the first seed, and of each seed at the best one."""

    lrs: dict[float, dict[str, Any]]
    lr: float
    seeds: list[dict[str, Any]]


def run(name: str, config: RunConfig, out: Path) -> dict[str, Any]:
    """The summary of a run, which is done first if need be."""
    label = f"{name}-lr{config.lr:g}-seed{config.seed}".replace(",", "").replace(" ", "-")
    folder = RunFolder(out / label)
    if folder.path.is_dir() and folder.summary() is not None:
        return dict(folder.summary() or {})
    shutil.rmtree(folder.path, ignore_errors=True)
    with new_folder(folder.path) as new:
        write_text(new / CONFIG, config.to_json())
    try:
        summary = train(folder, Display(Console(), label, brief=True), start=starter(ROWS[name]))
    except DivergenceError as error:
        summary = {"validation_loss": None, "diverged_at": error.step}
    summary["commit"] = commit()
    folder.write_summary(summary)
    print(f"{label}: validation loss {_number(summary['validation_loss'])}", flush=True)
    return summary


def find(name: str, out: Path) -> Found:
    """Run a row's grid on the first seed, and its best rate on the others."""
    config = replace(RunConfig.resolve(**ROWS[name].options, **JOB, seed=SEEDS[0]), prepared=f"../{CORPUS}")
    lrs = {lr: run(name, replace(config, lr=lr), out) for lr in LRS}
    lr = min(lrs, key=lambda each: _loss(lrs[each]))
    return Found(lrs, lr, [run(name, replace(config, lr=lr, seed=seed), out) for seed in SEEDS])


def _loss(summary: dict[str, Any]) -> float:
    loss = summary["validation_loss"]
    return float("inf") if loss is None else float(loss)


def _number(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def table(found: dict[str, Found]) -> list[str]:
    """One line a row: its bytes and losses."""
    heads = ("optimizer", "state", "of AdamW's", "lr", "validation loss", "standard deviation", "of the seeds")
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name, row in found.items():
        losses = [_loss(summary) for summary in row.seeds]
        state, whole = row.seeds[0]["optimizer_state_bytes"], row.seeds[0]["adamw_state_bytes"]
        cells = (
            name,
            format_bytes(state),
            f"{state / whole:.1%}",
            f"{row.lr:g}",
            f"{mean(losses):.4f}",
            f"{stdev(losses):.4f}",
            ", ".join(_number(summary["validation_loss"]) for summary in row.seeds),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def grid(found: dict[str, Found]) -> list[str]:
    """Everything that was tried on the first seed."""
    lines = ["| optimizer | " + " | ".join(f"lr {lr:g}" for lr in LRS) + " |", "|" + " --- |" * (len(LRS) + 1)]
    for name, row in found.items():
        losses = [_number(row.lrs[lr]["validation_loss"]) for lr in LRS]
        lines.append(f"| {name} | {' | '.join(losses)} |")
    return lines


def as_markdown(found: dict[str, Found], arguments: Sequence[str]) -> str:
    summaries = [summary for row in found.values() for summary in (*row.lrs.values(), *row.seeds)]
    finished = [summary for summary in summaries if summary["validation_loss"] is not None]
    versions = {name: version for summary in finished for name, version in summary["versions"].items()}
    machines = sorted({summary["machine"] for summary in finished})
    commits = sorted({summary["commit"] for summary in summaries})
    return "\n".join(
        [
            "# The loss with state in few bits",
            "",
            f"A Llama of 2.1M parameters, 500 steps of 1,024 tokens, embeddings and output head at {EMBEDDING_LR:g}; "
            f"mean over seeds {', '.join(map(str, SEEDS))}, each at the rate that was best on the first one. State is "
            "measured from its tensors, those inside of tensor subclasses and shared ones once.",
            "",
            *table(found),
            "",
            f"Everything that was tried, on seed {SEEDS[0]}:",
            "",
            *grid(found),
            "",
            f"- `{shlex.join(['python', '-m', 'benchmarks.low_bit_quality', *arguments])}`, one thread",
            f"- commit {', '.join(commits)}; {'; '.join(machines)}",
            f"- {', '.join(f'{name} {version}' for name, version in versions.items())}",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    given = quality.parser(__doc__, ROWS).parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # of bitsandbytes' kernels, which do not ask torch
    machine.prepare("torch", hub=False)
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / CORPUS).is_dir():
        write_corpus(RunConfig.resolve(**JOB), given.out / CORPUS)
    try:
        found = {name: find(name, given.out) for name in given.rows}
    except StoppedError as error:
        sys.exit(error.exit_code)
    command = sys.argv[1:] if arguments is None else arguments
    (given.out / "table.md").write_text(as_markdown(found, command), encoding="utf-8")


if __name__ == "__main__":
    main()
