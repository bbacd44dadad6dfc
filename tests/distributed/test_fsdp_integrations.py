"""FSDP2 and DDP as Accelerate and Hugging Face's Trainer set them up, with their checkpoints."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from floragrad import Flora, param_groups
from floragrad.accelerate import FloraAccelerator
from floragrad.transformers import FloraFactory, FloraTrainer
from tests.distributed.cases import full
from tests.distributed.conftest import Worlds
from tests.distributed.test_integrations import accelerate_state
from tests.distributed.test_training import batches, llama
from tests.marks import slow

STEPS, HALF = 6, 3
TOLERANCE = 1e-4
"""Relative: six steps in float32, whose gradients are summed in other orders."""


def build(kind: type[Accelerator] = Accelerator, **options: Any) -> tuple[Accelerator, nn.Module, Any]:
    """A model and Flora, made first and prepared together, as Accelerate's guide does it."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    # Accelerate shards on accelerators only; all that it does is done by torch, which shards on CPUs as well.
    state = PartialState(cpu=True)
    assert state.distributed_type == DistributedType.MULTI_CPU
    state.distributed_type = DistributedType.MULTI_GPU
    accelerator = kind(fsdp_plugin=plugin, **options)
    model = llama(torch.float32)
    optimizer = Flora(param_groups(model, lr=2e-3), rank=8, kappa=3, state_dtype="float32")
    return accelerator, *accelerator.prepare(model, optimizer)


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, tokens: list[Tensor]) -> None:
    for batch in tokens:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def whole_parameters(model: nn.Module) -> list[Tensor]:
    return [full(param).clone() for param in model.parameters()]


def accelerate_goes_on(rank: int, folder: str) -> list[Tensor]:
    """Load what another number of processes saved."""
    with accelerate_state():
        accelerator, model, optimizer = build()
        accelerator.load_state(folder)
        train(accelerator, model, optimizer, batches(rank, torch.distributed.get_world_size())[HALF:STEPS])
        return whole_parameters(model)


def accelerate_saves_and_resumes(rank: int, folder: str) -> list[Tensor]:
    tokens = batches(rank, 2)[:STEPS]
    with accelerate_state():
        accelerator, model, optimizer = build()
        assert accelerator.is_fsdp2
        assert all(isinstance(param, DTensor) for param in model.parameters())
        report = optimizer.optimizer.report()
        assert report.compressed > 0
        train(accelerator, model, optimizer, tokens[:HALF])
        accelerator.save_state(folder)
        train(accelerator, model, optimizer, tokens[HALF:])
        expected = whole_parameters(model)
    with accelerate_state():
        accelerator, model, optimizer = build()
        train(accelerator, model, optimizer, tokens[:1])  # what is there before must not matter
        accelerator.load_state(folder)
        train(accelerator, model, optimizer, tokens[HALF:])
        assert all(torch.equal(a, b) for a, b in zip(expected, whole_parameters(model), strict=True))
    alone = llama(torch.float32)
    plain = Flora(param_groups(alone, lr=2e-3), rank=8, kappa=3, state_dtype="float32")
    for batch in batches(0, 1)[:STEPS]:
        alone(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
    assert_close(expected, whole_parameters(alone))
    return expected


def test_accelerate(worlds: Worlds, tmp_path: Path) -> None:
    """Prepared, clipped, saved and resumed bit for bit, on 4 processes too; what one makes of the same batches."""
    folder = str(tmp_path / "checkpoint")
    expected = worlds(2).run(accelerate_saves_and_resumes, folder)[0]
    for found in worlds(4).run(accelerate_goes_on, folder):
        assert_close(found, expected)


def accumulated(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, tokens: list[Tensor], folder: str = ""
) -> list[float]:
    """Windows of three micro-batches; saved after the first if there is a folder. The norms."""
    norms = []
    for batch in tokens:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and folder:
            accelerator.save_state(folder)
            folder = ""
    return norms


def accelerate_accumulates(rank: int, folder: str) -> None:
    tokens, windows = batches(rank, 2)[: 2 * HALF], {"gradient_accumulation_steps": HALF}
    exactly: dict[str, Any] = {**windows, "accumulation": {"state_dtype": "float32"}}
    results = []
    deferred = {**exactly, "defer_reduction": True}
    for kind, options in ((Accelerator, windows), (FloraAccelerator, exactly), (FloraAccelerator, deferred)):
        with accelerate_state():
            accelerator, model, optimizer = build(kind, **options)
            norms = accumulated(accelerator, model, optimizer, tokens)
            results.append((norms, whole_parameters(model)))
            accelerator.end_training()
    (norms, params), *others = results
    for found_norms, found in others:
        assert found_norms == pytest.approx(norms, rel=1e-4)
        assert_close(found, params)
    with accelerate_state(), pytest.raises(ValueError, match="give an fsdp_plugin"):
        FloraAccelerator(gradient_accumulation_steps=2, cpu=True, defer_reduction=True)
    resumed = []
    for resume in (False, True):
        with accelerate_state():
            accelerator, model, optimizer = build(FloraAccelerator, **exactly)
            if resume:
                accelerator.load_state(folder)
            accumulated(accelerator, model, optimizer, tokens[HALF if resume else 0 :], "" if resume else folder)
            resumed.append(whole_parameters(model))
            accelerator.end_training()
    assert all(torch.equal(a, b) for a, b in zip(*resumed, strict=True))


def test_accelerate_accumulates(worlds: Worlds, tmp_path: Path) -> None:
    """Sketches of shards: in float32 the numbers of Accelerate's own accumulation; saved between windows."""
    worlds(2).run(accelerate_accumulates, str(tmp_path / "checkpoint"))


def trained_by_trainer(
    folder: str, kind: str, steps: int, *, accumulation: dict[str, Any] | None = None, resume: bool = False
) -> tuple[list[Tensor], list[float]]:
    """Parameters and norms; ``accumulation`` of the sketches, or None for the Trainer's own accumulation."""
    sharding: dict[str, Any] = {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    }
    with accelerate_state():
        state = PartialState(cpu=True)
        if kind == "fsdp":
            state.distributed_type = DistributedType.MULTI_GPU
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=4 // state.num_processes,
            gradient_accumulation_steps=2,
            max_steps=steps,
            max_grad_norm=0.5,
            save_steps=HALF,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            lr_scheduler_type="constant",
            accelerator_config={"use_configured_state": True},
            **(sharding if kind == "fsdp" else {}),
        )
        options: dict[str, Any] = {} if accumulation is None else {"accumulation": accumulation}
        trainer = (Trainer if accumulation is None else FloraTrainer)(
            model=llama(torch.float32),
            args=args,
            train_dataset=[{"input_ids": row, "labels": row} for batch in batches(0, 1) for row in batch],
            # Grouped by the factory, and by the Trainer.
            optimizer_cls_and_kwargs=(
                {"fsdp": FloraFactory, "ddp": Flora}[kind],
                {"lr": 2e-3, "rank": 8, "kappa": 3, "state_dtype": "float32"},
            ),
            **options,
        )
        trainer.train(resume_from_checkpoint=resume)
        model = trainer.accelerator.unwrap_model(trainer.model)
        assert all(isinstance(param, DTensor) == (kind == "fsdp") for param in model.parameters())
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        return whole_parameters(model), norms


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for param, other in zip(expected, found, strict=True):
        assert (param - other).abs().max() <= TOLERANCE * param.abs().max()


def trainer_saves_and_resumes(_: int, folder: str, kind: str) -> list[Tensor]:
    theirs, their_norms = trained_by_trainer(f"{folder}/theirs", kind, STEPS)
    exactly = {"state_dtype": "float32"}
    params, norms = trained_by_trainer(f"{folder}/ours", kind, STEPS, accumulation=exactly)
    assert_close(params, theirs)
    assert norms == pytest.approx(their_norms, rel=1e-4)
    trained_by_trainer(f"{folder}/halves", kind, HALF, accumulation=exactly)
    torch.distributed.barrier()
    resumed, _ = trained_by_trainer(f"{folder}/halves", kind, STEPS, accumulation=exactly, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    return params


def trainer_goes_on(_: int, folder: str, kind: str) -> list[Tensor]:
    """Resume what another number of processes saved."""
    checkpoint = {"state_dtype": "float32"}
    return trained_by_trainer(f"{folder}/other", kind, STEPS, accumulation=checkpoint, resume=True)[0]


@pytest.mark.parametrize("kind", [slow("ddp"), "fsdp"])  # test_integrations.py has DDP too
def test_trainer(worlds: Worlds, tmp_path: Path, kind: str) -> None:
    """Sketches in float32 are the Trainer's own sums; clipped, saved, and resumed on 2 processes bit for bit, on 4."""
    expected = worlds(2).run(trainer_saves_and_resumes, str(tmp_path), kind)[0]
    shutil.rmtree(tmp_path / f"halves/checkpoint-{STEPS}")
    (tmp_path / "halves").rename(tmp_path / "other")
    for found in worlds(4).run(trainer_goes_on, str(tmp_path), kind):
        assert_close(found, expected)
