"""The paper's main experiment: gradient accumulation and momentum, whole, with LoRA and with Flora.

    python -m replication.tables
    python -m replication.tables --preset paper

Every row is trained by Adafactor and differs in what it keeps beside the factored second moment.

*Accumulation* is fine-tuning in 16 micro-batches a step: *None* makes a step of each micro-batch, *Naive* sums their
gradients, *LoRA(r)* trains adapters and sums their gradients, *Flora(r)* sums random projections of the gradients,
but of the embedding's the gradients themselves. All read as many examples. *Momentum* (β₁ = 0.9) is training from
scratch: *None* has none, *Naive* keeps it whole, *LoRA(r)* keeps the adapters', *Flora(r)* its random projection.
*Flora(r)* is the paper's: Gaussian projections, unbiased, float32, and of the momentum a new one every κ steps.
*Flora, ours* are floragrad's defaults: of the accumulator, int4 with every column; of the momentum, int8, signs and r
= width / 4. Updates are scaled by the size of the weights, as Adafactor does by default, but for LoRA's, whose B is 0
at first, and ours: their learning rates are on another scale.

The small preset trains models from scratch on two cores, and fine-tunes them after they have learnt to go on with the
first half of a package's description. r is given for the width of 512 and scaled to the model's. A T5 summarizes
descriptions of Debian's packages, and a GPT-2 translates FreeDict's German-English dictionary; two more tables are
those of the T5's momentum at other widths. The paper's preset takes T5-3B and T5-small on XSum and GPT-2 on IWSLT
2017 from the hub, on a GPU. Every tenth example is held out.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from pathlib import Path
from statistics import mean, stdev
from tempfile import mkdtemp
from typing import Any, Final, cast

from transformers import AutoConfig

from benchmarks import harness
from floragrad._text import format_bytes
from floragrad.cli import machine
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.folder import CORPUS, RunFolder, new_folder
from floragrad.cli.train.measures import measure_name
from floragrad.cli.train.run import check_model, write_corpus
from floragrad.cli.train.tasks import TASKS
from floragrad.cli.train.tasks.pair_data import PairData
from replication.experiments import PRESETS, Experiment, Preset, method, rows
from replication.models import write_bare, write_halves, write_small
from replication.runs import run_all

SCORES: Final = {"summarization": ("rouge1", "rouge2", "rougeL"), "seq2seq": ("bleu",)}
_DATA, _TEXT = "data", "text"

Runs = Mapping[str, Mapping[Path, RunConfig]]
"""Folder and configuration of each row's runs."""
Losses = Mapping[str, Mapping[float, float]]
"""Validation loss by method and learning rate."""


@dataclass(frozen=True)
class Work:
    """Everything of a preset in one folder: what is there already is not made again.

    Attributes:
        preset: Names and sizes.
        folder: Where it is.
        seeds: Of the runs.
        jobs: Runs at once.
        threads: Of each.
    """

    preset: Preset
    folder: Path
    seeds: tuple[int, ...]
    jobs: int
    threads: int

    def rows(self, experiment: Experiment) -> dict[str, RunConfig]:
        """Return the configuration of each row, at the learning rate that is tried first, and prepare what it reads."""
        home = self.folder / experiment.task
        model = self._begin(experiment, home)
        examples = self._data(experiment, home, model).facts.train_pairs
        if experiment.name == "accumulation" and not experiment.model:
            model = self._pretrained(home, model)
        found: dict[str, RunConfig] = {}
        for name, options in rows(experiment, self.preset, AutoConfig.from_pretrained(model).hidden_size):
            micro_batches = ceil((experiment.examples or experiment.epochs * examples) / experiment.batch)
            steps = max(1, micro_batches // options.get("accumulate", 1))
            config = self._config(
                experiment.task,
                model=model,
                batch_size=experiment.batch,
                steps=steps,
                schedule="constant",
                warmup_steps=int(self.preset.warmup * steps),
                eval_every=steps,
                keep_checkpoint=False,
                **options,
            )
            check_model(config)
            found[name] = replace(config, prepared=f"../{_DATA}/{CORPUS}")
        return found

    def search(self, experiment: Experiment, configs: Mapping[str, RunConfig]) -> Losses:
        """Try learning rates with the first seed, a factor of 3 apart, until none at either end is the best.

        All ranks of a method have the rate of the largest.

        Returns:
            What was found; nothing if the preset gives the rates.
        """
        if not self.preset.search:
            return {}
        largest = {method(name): name for name in configs if "κ" not in name}
        tried = {each: {configs[name].lr * factor for factor in (1 / 3, 1, 3)} for each, name in largest.items()}
        while True:
            runs = {
                (each, lr): self._run(experiment, name, replace(configs[name], lr=lr), self.seeds[0])
                for each, name in largest.items()
                for lr in tried[each]
            }
            run_all(dict(runs.values()), self.jobs)
            losses = {each: {lr: _loss(runs[each, lr][0]) for lr in sorted(tried[each])} for each in tried}
            for each, rates in tried.items():
                best = best_rate(losses[each])
                rates |= {lr for lr in (best / 3, best * 3) if not min(rates) * 0.99 < lr < max(rates) * 1.01}
            if tried == {each: set(rates) for each, rates in losses.items()}:
                return losses

    def runs(self, experiment: Experiment, configs: Mapping[str, RunConfig], losses: Losses) -> Runs:
        """Return the folder and the configuration of each row's runs, one a seed, at the best learning rate."""
        best = {name: best_rate(losses[method(name)]) if losses else config.lr for name, config in configs.items()}
        return {
            name: dict(self._run(experiment, name, replace(config, lr=best[name]), seed) for seed in self.seeds)
            for name, config in configs.items()
        }

    def _run(self, experiment: Experiment, name: str, config: RunConfig, seed: int) -> tuple[Path, RunConfig]:
        row = name.lower().translate(str.maketrans("(,κ", "--k", ") ="))
        stem = f"{experiment.name}{experiment.width or ''}-{row}-lr{config.lr:.3g}"
        return self.folder / experiment.task / f"{stem}-seed{seed}", replace(config, seed=seed)

    def _config(self, task: str, **options: Any) -> RunConfig:
        scored = self.preset.scored
        sizes = {"eval_blocks": scored, "generate_blocks": scored, "threads": self.threads}
        return RunConfig.resolve(task=task, **{**self.preset.data[task], **sizes, **options})

    def _begin(self, experiment: Experiment, home: Path) -> str:
        """Return the model to fine-tune, by its name, or to train from scratch, a folder that is written first."""
        if experiment.model and experiment.name == "accumulation":
            return experiment.model
        folder, preset = home / (Path(experiment.model).name or f"small{experiment.width or ''}"), self.preset
        if not folder.is_dir():
            data = preset.data[experiment.task]
            with new_folder(folder) as new:
                if experiment.model:
                    write_bare(experiment.model, new)
                else:
                    positions = data["sequence_length"] + data["target_length"]
                    width = experiment.width or preset.width
                    write_small(experiment.task, new, width, preset.layers, preset.vocabulary, positions)
        return str(folder.resolve())

    def _data(self, experiment: Experiment, home: Path, model: str) -> PairData:
        """Return the data of a task, which are written first."""
        task = TASKS[experiment.task]
        if not (home / _DATA).is_dir():
            with new_folder(home / _DATA) as new:
                write_corpus(self._config(experiment.task, model=model), new / CORPUS)
                if not experiment.model:
                    write_halves(new / _TEXT, self.preset.data[experiment.task]["max_megabytes"])
        return cast(PairData, task.load(home / _DATA / CORPUS))

    def _pretrained(self, home: Path, model: str) -> str:
        """Return a small model's checkpoint after it has learnt to go on with texts."""
        options = {**self.preset.data[home.name], **self.preset.pretraining}
        text = str((home / _DATA / _TEXT).resolve())
        config = RunConfig.resolve(
            task="summarization",
            model=model,
            dataset=text,
            optimizer="adamw",
            eval_every=options["steps"],
            threads=self.threads,
            **{**options, "source_prefix": "", "source_suffix": " "},
        )
        run_all({home / "pretrained": config}, min(1, self.jobs))
        ((_, checkpoint),) = RunFolder.open(home / "pretrained").checkpoints()
        return str(checkpoint.resolve())


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the learning rate of the lowest loss."""
    return min(losses, key=losses.__getitem__)


def _loss(run: Path) -> float:
    return float((RunFolder(run).summary() or {}).get("validation_loss", inf))


def section(experiment: Experiment, runs: Runs, losses: Losses) -> list[str]:
    """Return the heading, the settings and the table of an experiment whose runs are finished."""
    found = {name: [RunFolder(path).summary() or {} for path in each] for name, each in runs.items()}
    config = next(iter(runs["Naive"].values()))
    scores = SCORES[experiment.task]
    head = ("method", *map(measure_name, scores), "validation loss", "peak memory", "Δ", "state and gradients", "Δ")
    cells = [
        (
            name,
            *(_spread([each.get(score) for each in found[name]]) for score in (*scores, "validation_loss")),
            *_sizes(found[name], found["None"]),
        )
        for name in runs
    ]
    about = next(each for each in found["Naive"] + found["None"] if "parameters" in each)
    count = config.units_per_step // config.micro_batches
    return [
        f"## {experiment.name.capitalize()}: {experiment.task}"
        + f", width {experiment.width}" * bool(experiment.width),
        "",
        *harness.table(head, cells),
        "",
        f"- {Path(experiment.model).name or 'a small model'}, {about['parameters']:,} parameters; "
        f"{config.steps} steps of {config.micro_batches} × {count} examples"
        + (f"; κ = {experiment.kappa} where none is named" if experiment.name == "momentum" else ""),
        f"- learning rates: {_rates(runs, losses)}; of our embedding {experiment.our_embedding_lr:g}",
        f"- scores of {config.eval_blocks} of {about['held_out_blocks']:,} held-out examples; mean ± standard "
        f"deviation over seeds {', '.join(path.name.rpartition('seed')[2] for path in runs['None'])}",
        f"- peak memory of the {about['peak_memory_of']}; state and gradients: bytes of the optimizer's state, of what "
        "is kept of the micro-batches' gradients and of adapters, measured from the tensors; Δ to None",
        "",
    ]


def _rates(runs: Runs, losses: Losses) -> str:
    """Return the rate of each method and, where it was searched, the validation losses of all rates that were tried."""
    chosen = {method(name): next(iter(each.values())).lr for name, each in runs.items()}
    if not losses:
        return ", ".join(f"{each} {lr:g}" for each, lr in chosen.items())
    texts = [
        f"{each} **{chosen[each]:.2g}** of {', '.join(f'{lr:.2g}: {loss:.3f}' for lr, loss in found.items())}"
        for each, found in losses.items()
    ]
    return f"the best by the validation loss of the first seed, with the largest r; {'; '.join(texts)}"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "diverged"
    return f"{mean(known):.2f}" + (f" ± {stdev(known):.2f}" if len(known) > 1 else "")


def _sizes(row: Sequence[Mapping[str, Any]], none: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the bytes of a row, each with the difference to the row without the technique."""
    if any("parameters" not in each for each in (*row, *none)):
        return ("–",) * 4
    whole = none[0]["parameters"]

    def kept(summary: Mapping[str, Any]) -> float:
        adapters = 4 * (summary["parameters"] - whole)  # float32
        return float(summary["optimizer_state_bytes"] + summary["accumulation_bytes"] + adapters)

    sizes = [(mean(each["peak_memory_bytes"] for each in found), mean(map(kept, found))) for found in (row, none)]
    return tuple(
        text for size, base in zip(*sizes, strict=True) for text in (format_bytes(size), _difference(size - base))
    )


def _difference(size: float) -> str:
    return f"{'−' if size < 0 else '+'}{format_bytes(abs(size))}" if size else "–"


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the runs that are not done yet, and write the page, after each table what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0, 1, 2; of the paper's preset 42, 43, 44")
    parser.add_argument("--jobs", type=int, help="runs at once; by default one for each core, of the paper's 1")
    parser.add_argument("--runs", type=Path, help="folder of the runs, continued if it is there; by default in runs/")
    parser.add_argument(
        "--out", type=Path, help="folder of the page; by default replication/results, of the smoke test --runs"
    )
    given = parser.parse_args(arguments)
    preset = PRESETS[given.preset]
    jobs = preset.jobs if given.jobs is None else given.jobs
    machine.prepare("torch", hub=given.preset == "paper")
    name = "tables" if given.preset == "small" else f"tables-{given.preset}"
    if given.preset == "smoke":
        given.runs = given.runs or Path(mkdtemp())
        given.out = given.out or given.runs
    given.out = given.out or harness.ROOT / "replication" / "results"
    threads = max(1, harness.cores() // jobs) if jobs else 1
    folder = given.runs or harness.ROOT / "runs" / name
    work = Work(preset, folder, tuple(given.seeds or preset.seeds), jobs, threads)
    sections: list[str] = []
    for experiment in preset.experiments:
        configs = work.rows(experiment)
        losses = work.search(experiment, configs)
        runs = work.runs(experiment, configs, losses)
        run_all({path: config for each in runs.values() for path, config in each.items()}, jobs)
        sections += section(experiment, runs, losses)
        harness.publish(given, name, [*_head(), *sections, *harness.environment(("torch", "transformers"))])


def _head() -> list[str]:
    return ["# Accumulation and momentum", "", (__doc__ or "").partition("--preset paper\n")[2].strip(), ""]


if __name__ == "__main__":
    main()
