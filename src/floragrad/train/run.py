"""A training run from its beginning to its end."""

from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator, set_seed

from floragrad.torch.integrations import AccumulationOptions
from floragrad.torch.integrations.transformers import FloraTrainerMixin
from floragrad.train import environment
from floragrad.train.callbacks import Recorder, Schedule, perplexity
from floragrad.train.config import RunConfig
from floragrad.train.corpus import Blocks, Corpus, prepare_corpus
from floragrad.train.display import Display
from floragrad.train.errors import DivergenceError, StoppedError
from floragrad.train.figures import run_figure, save
from floragrad.train.folder import CONFIG, CORPUS, FIGURE, RunFolder, check_free, new_folder, write_text
from floragrad.train.interrupt import StopRequest
from floragrad.train.models import build_model, model_config, rebuild_model
from floragrad.train.optimizers import adamw_bytes, check_rank, gradient_bytes, optimizer_class, state_bytes
from floragrad.train.presets import PRESETS
from floragrad.train.sources import read_documents


def begin(config: RunConfig, out: Path) -> RunFolder:
    """Make the folder of a new run: its configuration, its text and its tokenizer.

    Raises:
        UserError: The run cannot be done; then there is no folder.
    """
    check_free(out)
    check_model(config)
    with new_folder(out) as folder:
        write_corpus(config, folder / CORPUS)
        write_text(folder / CONFIG, config.to_json())
    return RunFolder(out)


def check_model(config: RunConfig) -> None:
    """Find out that the model cannot be trained before any text is read.

    Raises:
        UserError: There is no such model, or the rank compresses none of it.
    """
    preset = PRESETS.get(config.model)
    vocab_size = config.vocab_size if preset is not None else model_config(config, 0).vocab_size
    assert vocab_size is not None
    check_rank(config, vocab_size)


def write_corpus(config: RunConfig, folder: Path) -> Corpus:
    """Read, tokenize and pack the text of a run into a new folder."""
    documents = read_documents(config)
    folder.mkdir()
    return prepare_corpus(config, documents, folder)


def train(folder: RunFolder, display: Display) -> dict[str, Any]:
    """Train the run in ``folder`` from where it stands to its end. Returns its summary.

    SIGINT and SIGTERM are caught meanwhile, so it runs in the main thread.

    Raises:
        StoppedError: A signal has stopped it; everything is saved.
        DivergenceError: The loss is no finite number any more; the newest checkpoint is from before that.
        UserError: Another process is training the same run.
    """
    stop = StopRequest()
    with folder.locked(), stop.listening():
        config, step = folder.config, folder.rewind()
        environment.configure_torch(config.threads)
        corpus = Corpus.load(folder.corpus)
        trainer, recorder = _trainer(config, folder, corpus, step, stop, display)
        _introduce(trainer, corpus, config, step, display)
        try:
            trainer.train(resume_from_checkpoint=str(folder.checkpoints()[-1][1]) if step else None)
        finally:
            display.end()
        if recorder.diverged_at is not None:
            raise DivergenceError(recorder.diverged_at)
        if stop.signum is not None and trainer.state.global_step < config.steps:
            raise StoppedError(folder.path, "train", stop.signum)
        return _finish(folder, config, trainer, recorder)


def _trainer(
    config: RunConfig, folder: RunFolder, corpus: Corpus, step: int, stop: StopRequest, display: Display
) -> tuple[Any, Recorder]:
    """The Trainer, and the callback that writes everything down."""
    set_seed(config.seed)
    model = (
        build_model(config, corpus.facts.vocab_size)
        if step == 0
        else rebuild_model(config, folder.checkpoints()[-1][1])
    )
    recorder = Recorder(config, folder, corpus.tokenizer, display)
    sketched = config.accumulator == "flora"
    trainer = (_SketchingTrainer if sketched else _OrderedTrainer)(
        model=model,
        args=_arguments(config, folder, step),
        train_dataset=corpus.train_blocks(config),
        eval_dataset=corpus.validation_blocks(config),
        data_collator=default_data_collator,
        optimizer_cls_and_kwargs=optimizer_class(config, model),
        callbacks=[Schedule(config, stop), recorder],
        **({"accumulation": _accumulation(config)} if sketched else {}),
    )
    trainer.remove_callback(PrinterCallback)
    # All blocks are as long, so the mean over batches is the mean over tokens. The Trainer's own count of tokens
    # depends on its version: some count the first one of a block too, which nothing predicts.
    trainer.model_accepts_loss_kwargs = False
    return trainer, recorder


class _OrderedTrainer(Trainer):  # type: ignore[misc]  # transformers carries no types
    """The Trainer, but for its shuffling: the blocks come in their final order."""

    def _get_train_sampler(self, train_dataset: Blocks | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class _SketchingTrainer(FloraTrainerMixin, _OrderedTrainer):
    """The same, with the gradients of a step's micro-batches kept as sketches."""


def _accumulation(config: RunConfig) -> AccumulationOptions:
    """Of the sketches."""
    options = {
        "ratio": config.accumulator_ratio,
        "state_dtype": config.accumulator_dtype,
        "projection": config.accumulator_projection,
        "seed": config.seed,
        "release": config.release,
    }
    return cast(AccumulationOptions, options)


def _arguments(config: RunConfig, folder: RunFolder, step: int) -> TrainingArguments:
    """The Trainer's settings. Evaluating, saving and logging are ours."""
    return TrainingArguments(
        output_dir=str(folder.staging),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.micro_batches,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        eval_on_start=step == 0,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to="none",
    )


def _introduce(trainer: Any, corpus: Corpus, config: RunConfig, step: int, display: Display) -> None:
    """Say what is about to happen."""
    facts = corpus.facts
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    skipped = f", {facts.skipped} files that are not text left out" if facts.skipped else ""
    display.say(
        f"{config.model}: {parameters:,} parameters in {config.dtype}, on {environment.machine()}\n"
        f"{facts.source}: {facts.documents:,} documents, {facts.megabytes:.1f} MB{skipped}; "
        f"{facts.train_tokens:,} tokens to train on, {facts.validation_tokens:,} held out, "
        f"vocabulary {facts.vocab_size:,}"
    )
    if step:
        display.say(f"continuing after step {step}")


def _finish(folder: RunFolder, config: RunConfig, trainer: Any, recorder: Recorder) -> dict[str, Any]:
    """Write the figure and the summary of a run that has made all its steps."""
    metrics = folder.metrics()
    evaluations = [line for line in metrics if "validation_loss" in line]
    first, last = evaluations[0]["validation_loss"], evaluations[-1]["validation_loss"]
    optimizer = trainer.optimizer.optimizer
    on_gpu = torch.cuda.is_available()
    save(run_figure(metrics, f"{Path(config.model).name} with {config.label}"), folder.path / FIGURE)
    if not config.keep_checkpoint:
        folder.drop_checkpoints()
    summary = {
        "model": config.model,
        "optimizer": config.optimizer,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": config.steps,
        "tokens": config.steps * config.tokens_per_step,
        "first_validation_loss": first,
        "validation_loss": last,
        "validation_loss_change": last / first - 1,
        "first_perplexity": perplexity(first),
        "perplexity": perplexity(last),
        "accumulator": config.accumulator,
        "micro_batches": config.micro_batches,
        "accumulation_bytes": recorder.accumulation_bytes,
        "gradient_bytes": gradient_bytes(optimizer),
        "optimizer_state_bytes": state_bytes(optimizer),
        "adamw_state_bytes": adamw_bytes(optimizer),
        "peak_memory_bytes": environment.peak_memory_bytes(),
        "peak_memory_of": "GPU" if on_gpu else "process",
        "seconds": recorder.seconds,
        "step_seconds": median(line["step_seconds"] for line in metrics if "step_seconds" in line),
        "machine": environment.machine(),
        "versions": environment.versions(),
    }
    folder.write_summary(summary)
    return summary
