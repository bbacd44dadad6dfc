"""A training run from its beginning to its end."""

import contextlib
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from floragrad.cli import machine
from floragrad.cli.disk import write_text
from floragrad.cli.errors import DivergenceError, StoppedError, UserError
from floragrad.cli.figures import run_figure, save
from floragrad.cli.methods import METHODS
from floragrad.cli.presets import TASKS as SIZES
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.corpus import Corpus
from floragrad.cli.train.data import Data
from floragrad.cli.train.display import Display
from floragrad.cli.train.folder import CONFIG, CORPUS, FIGURE, RunFolder, check_free, new_folder
from floragrad.cli.train.interrupt import StopRequest
from floragrad.cli.train.measures import measures_of
from floragrad.cli.train.processes import ALONE, Processes
from floragrad.cli.train.recorder import Recorder, Schedule, perplexity
from floragrad.cli.train.tasks import TASKS

if TYPE_CHECKING:
    from floragrad.cli.train.jax.loop import JaxEngine
    from floragrad.cli.train.trainer import TrainerEngine

    Engine: TypeAlias = TrainerEngine | JaxEngine


def start(config: RunConfig, folder: RunFolder, data: Data, step: int, processes: Processes) -> "Engine":
    """Return the engine of ``--backend``, at the step of the newest checkpoint, or at 0 with new weights."""
    if config.backend == "jax":
        from floragrad.cli.train.jax.loop import JaxEngine

        assert isinstance(data, Corpus)
        return JaxEngine(config, folder, data, step)
    from floragrad.cli.train.trainer import TrainerEngine

    return TrainerEngine(config, folder, TASKS[config.task], data, step, processes)


def begin(config: RunConfig, out: Path) -> RunFolder:
    """Make the folder of a new run: its configuration and its data. There is none if the run cannot be done."""
    check_free(out)
    check_model(config)
    with new_folder(out) as folder:
        write_corpus(config, folder / CORPUS)
        write_text(folder / CONFIG, config.to_json())
    return RunFolder(out)


def check_model(config: RunConfig) -> None:
    """Refuse a model, optimizer, service or rank with which the run cannot be done, before any data are read."""
    if config.backend == "torch" and (remedy := METHODS[config.optimizer].remedy):
        raise UserError(f"--optimizer {config.optimizer} is not installed: {remedy}")
    if config.report_to != ("none",):
        from floragrad.cli.train.trainer import reporters

        reporters(config.report_to, Path())
    preset = SIZES[config.task].get(config.model)
    if preset is not None:
        widest = preset.hidden_size
    else:
        from floragrad.cli.train.models import widest_matrix

        widest = widest_matrix(TASKS[config.task].auto_class, config)
    if config.rank is not None and METHODS[config.optimizer].is_flora and widest < 2 * config.rank:
        raise UserError(
            f"--rank {config.rank} compresses nothing: the smaller side of the hidden matrices of --model "
            f"{config.model} is {widest}, and a sketch needs half of it or less: give at most {widest // 2}"
        )


def write_corpus(config: RunConfig, folder: Path) -> Data:
    """Read and prepare the data of a run in a new folder."""
    return TASKS[config.task].prepare(config, folder)


def train(folder: RunFolder, display: Display, processes: Processes = ALONE) -> dict[str, Any]:
    """Train the run in ``folder`` from where it stands to its end. Returns its summary.

    SIGINT and SIGTERM are caught meanwhile, so it runs in the main thread. Of several processes all call it; the
    leader alone locks the folder and writes to it.

    Raises:
        StoppedError: A signal has stopped it; everything is saved.
        DivergenceError: The loss is no finite number any more; the newest checkpoint is from before that.
    """
    stop = StopRequest()
    with contextlib.ExitStack() as held:
        step = processes.share(lambda: _take(folder, held))
        display.say(f"run folder: {folder.path}")
        held.enter_context(stop.listening())
        config = folder.config
        data = TASKS[config.task].load(folder.corpus)
        engine = start(config, folder, data, step, processes)
        recorder = Recorder(config, folder, data.processor, display, engine.gpu, processes)
        _introduce(engine, data, config, step, display)
        try:
            made = engine.run(Schedule(config, stop, processes), recorder)
        finally:
            display.end()
        if recorder.diverged_at is not None:
            raise DivergenceError(recorder.diverged_at)
        if stop.signum is not None and made < config.steps:
            raise StoppedError(folder.path, f"{processes.program} train", stop.signum)
        return processes.share(lambda: _finish(folder, config, data, engine, recorder, processes))


def _take(folder: RunFolder, held: contextlib.ExitStack) -> int:
    """Lock the folder, and go back to its newest checkpoint. Returns its step, or 0."""
    held.enter_context(folder.locked())
    step = folder.rewind()
    held.callback(folder.tidy, checkpoints=True)
    return step


def _introduce(engine: "Engine", data: Data, config: RunConfig, step: int, display: Display) -> None:
    """Show the model, the data and the validation blocks."""
    task, held_out = TASKS[config.task], data.held_out_blocks(config)
    display.say(
        f"{config.job}: {engine.parameters:,} parameters in {config.dtype}, on {machine.describe(engine.gpu)}\n"
        f"{data.describe()}\n"
        f"validation with {min(config.eval_blocks, held_out):,} of {held_out:,} {task.blocks}, "
        f"drawn from {task.everything}"
    )
    if step:
        display.say(f"continuing after step {step}")


def _finish(
    folder: RunFolder, config: RunConfig, data: Data, engine: "Engine", recorder: Recorder, processes: Processes
) -> dict[str, Any]:
    """Write the figure and the summary of a run that has made all its steps."""
    metrics = folder.metrics()
    evaluations = [line for line in metrics if "validation_loss" in line]
    first, last = evaluations[0]["validation_loss"], evaluations[-1]["validation_loss"]
    with folder.writing():
        save(run_figure(metrics, f"{Path(config.job).name} with {config.label}"), folder.path / FIGURE)
    summary = {
        "task": config.task,
        "model": config.model,
        "optimizer": config.optimizer,
        "backend": config.backend,
        "parameters": engine.parameters,
        "processes": processes.size,
        "fsdp": processes.sharded,
        "steps": config.steps,
        config.unit: config.steps * config.units_per_step,
        "first_validation_loss": first,
        "validation_loss": last,
        "validation_loss_change": last / first - 1,
        "first_perplexity": perplexity(first),
        "perplexity": perplexity(last),
        **measures_of(evaluations[-1]),
        "standard_error": evaluations[-1].get("standard_error"),
        "block_losses": evaluations[-1].get("block_losses"),
        "held_out_blocks": data.held_out_blocks(config),
        "accumulator": config.accumulator,
        "micro_batches": config.micro_batches,
        **engine.sizes(),
        "peak_memory_bytes": machine.peak_memory_bytes(engine.gpu),
        "peak_memory_of": "process" if engine.gpu is None else "GPU",
        "seconds": recorder.seconds,
        "step_seconds": median(line["step_seconds"] for line in metrics if "step_seconds" in line),
        "machine": machine.describe(engine.gpu),
        "versions": machine.versions(engine.libraries),
    }
    folder.write_summary(summary)
    folder.tidy(checkpoints=config.keep_checkpoint)
    return summary
