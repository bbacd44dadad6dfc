"""FSDP2 as Accelerate and Hugging Face's Trainer set it up, with their checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from floragrad import Flora, param_groups
from floragrad.torch.integrations.accelerate import FloraAccelerator
from tests.distributed.cases import full
from tests.distributed.conftest import Worlds
from tests.distributed.test_integrations import accelerate_state
from tests.distributed.test_training import batches, llama

STEPS, HALF = 6, 3
TOLERANCE = 1e-5


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


def accelerate_saves_and_resumes(rank: int, folder: str) -> None:
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
    for param, other in zip(whole_parameters(alone), expected, strict=True):
        assert (param - other).abs().max() <= 1e-3 * param.abs().max()


def test_accelerate(worlds: Worlds, tmp_path: Path) -> None:
    """Prepared, clipped, saved and resumed bit for bit; and what one process makes of the same batches."""
    worlds(2).run(accelerate_saves_and_resumes, str(tmp_path / "checkpoint"))


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
    for kind, options in ((Accelerator, windows), (FloraAccelerator, exactly)):
        with accelerate_state():
            accelerator, model, optimizer = build(kind, **options)
            norms = accumulated(accelerator, model, optimizer, tokens)
            results.append((norms, whole_parameters(model)))
            accelerator.end_training()
    (norms, params), (found_norms, found) = results
    assert found_norms == pytest.approx(norms, rel=1e-4)
    for param, other in zip(params, found, strict=True):
        assert (param - other).abs().max() <= 1e-3 * param.abs().max()
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


def trainer_args(folder: str, steps: int) -> TrainingArguments:
    return TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        max_steps=steps,
        save_steps=HALF,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        lr_scheduler_type="constant",
        accelerator_config={"use_configured_state": True},
        fsdp="full_shard auto_wrap",
        fsdp_config={"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    )


def trained_by_trainer(folder: str, steps: int, *, resume: bool) -> tuple[list[Tensor], list[float]]:
    with accelerate_state():
        state = PartialState(cpu=True)
        state.distributed_type = DistributedType.MULTI_GPU
        model = llama(torch.float32)
        data = [{"input_ids": row, "labels": row} for batch in batches(0, 1) for row in batch]
        trainer = Trainer(
            model,
            trainer_args(folder, steps),
            train_dataset=data,  # type: ignore[arg-type]
            optimizer_cls_and_kwargs=(Flora, {"lr": 2e-3, "rank": 8, "kappa": 3}),
        )
        trainer.train(resume_from_checkpoint=resume)
        assert all(isinstance(param, DTensor) for param in trainer.model.parameters())
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [full(param).clone() for param in trainer.model.parameters()], losses


def trainer_saves_and_resumes(_: int, folder: str) -> None:
    params, losses = trained_by_trainer(f"{folder}/whole", STEPS, resume=False)
    assert losses[-1] < losses[0]
    trained_by_trainer(f"{folder}/halves", HALF, resume=False)
    resumed, _ = trained_by_trainer(f"{folder}/halves", STEPS, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def test_trainer(worlds: Worlds, tmp_path: Path) -> None:
    """Trained, saved and resumed bit for bit."""
    worlds(2).run(trainer_saves_and_resumes, str(tmp_path))
