"""Other libraries' loops in two processes: the same numbers as theirs, and nothing averaged by the wrapper."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from floragrad import Flora
from floragrad.torch.integrations.accelerate import FloraAccelerator
from floragrad.torch.integrations.lightning import FloraAccumulation
from tests.distributed.conftest import Worlds
from tests.integrations import test_accelerate as accelerate_cases
from tests.integrations import test_lightning as lightning_cases
from tests.integrations import test_transformers as transformers_cases
from tests.torch.accumulation_cases import STEPS, Net, flat, flora

ACCELERATE = [
    case
    for case in accelerate_cases.CASES
    if case.name in ("release", "release-not-clipped", "release-several-passes", "release-fp16-overflow", "materialise")
]
TRAINER = [case for case in transformers_cases.CASES if case.name in ("flora", "flora-means", "adamw", "flora-fp16")]


LAUNCHED = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
"""What a launcher tells its processes; the process group of the tests is there already, so nobody meets there."""


@contextmanager
def counted() -> Iterator[list[int]]:
    """The gradient buckets that wrappers average meanwhile."""
    buckets: list[int] = []

    def hook(state: None, bucket):
        buckets.append(bucket.buffer().numel())
        future = torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    original = DistributedDataParallel.__init__

    def constructed(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.register_comm_hook(None, hook)

    with patch.object(DistributedDataParallel, "__init__", constructed):
        yield buckets


@contextmanager
def accelerate_state() -> Iterator[None]:
    """Accelerate keeps its settings in objects of the process."""
    # It would end the process group, which stays.
    with patch.object(torch.distributed, "destroy_process_group"), patch.dict(os.environ, LAUNCHED):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def in_accelerate(rank: int, index: int, compress: bool) -> tuple[dict[str, Any], int]:
    with accelerate_state(), counted() as buckets:
        accelerator = accelerate_cases.made(ACCELERATE[index], compress)
        assert accelerator.num_processes == 2
        return accelerate_cases.trained(ACCELERATE[index], accelerator), len(buckets)


@pytest.mark.parametrize("case", ACCELERATE, ids=str)
def test_accelerate(worlds: Worlds, case: Any) -> None:
    """What Accelerate gets with DistributedDataParallel, which averages gradients there and none here."""
    index = ACCELERATE.index(case)
    ours, theirs = (worlds(2).run(in_accelerate, index, compress) for compress in (True, False))
    for (found, sent), (expected, averaged) in zip(ours, theirs, strict=True):
        assert (sent, averaged > 0) == (0, True)
        assert torch.equal(found["parameters"], ours[0][0]["parameters"])
        for key in ("rates", "skipped", "scale"):
            assert found[key] == expected[key], key
        for key in ("norms", "losses", "parameters"):
            mine, other = torch.as_tensor(found[key]), torch.as_tensor(expected[key])
            scale = other[other.isfinite()].abs().max() if other.numel() else 1.0
            # One more rounding of float32 than in one process, of a sum over the ranks.
            bound = 2 * case.tolerance
            assert torch.allclose(mine / scale, other / scale, rtol=0, atol=bound, equal_nan=True), key


class TwoHeads(nn.Module):
    """Two layers, for two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).square().mean()


def in_accelerate_refused(rank: int, folder: str) -> list[str]:
    """What several processes cannot do in Accelerate, by the messages."""
    said = []
    with accelerate_state():
        accelerator = FloraAccelerator(cpu=True, gradient_accumulation_steps=2)
        model = TwoHeads()
        wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.first.parameters(), lr=0.1))
        with pytest.raises(RuntimeError) as caught, accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(torch.ones(2, 8)))
        said.append(str(caught.value))
        optimizer.zero_grad()
        model.second.requires_grad_(False)
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(torch.ones(2, 8)))
        with pytest.raises(RuntimeError) as caught:
            accelerator.save_state(folder)
        said.append(str(caught.value))
        with pytest.raises(RuntimeError) as caught, accelerator.join_uneven_inputs([wrapped]):
            pass
        said.append(str(caught.value))
        accelerator.free_memory()
        said.append(str(wrapped.require_backward_grad_sync))
    return said


def test_what_accelerate_cannot_do_is_refused(worlds: Worlds, tmp_path: Path) -> None:
    for untrained, saving, joining, synced in worlds(2).run(in_accelerate_refused, str(tmp_path)):
        assert "second.weight is in no prepared optimizer" in untrained
        assert "saving inside a window of several processes" in saving
        assert "even_batches=True" in joining
        assert synced == "True", "the wrapper is given back"


def saved_between(rank: int, folder: str, load: bool) -> Tensor:
    """Two windows of int4, the second from a state that was saved and loaded."""
    with accelerate_state():
        accelerator = FloraAccelerator(cpu=True, gradient_accumulation_steps=STEPS)
        torch.manual_seed(0)
        model = Net()
        model, optimizer = accelerator.prepare(model, flora(model.parameters()))
        if load:
            accelerator.load_state(folder)
        for window in range(int(load), 2):
            for number in range(STEPS):
                generator = torch.Generator().manual_seed(100 * window + 10 * number + rank)
                with accelerator.accumulate(model):
                    accelerator.backward(model(torch.randint(0, 200, (2, 7), generator=generator)))
                    optimizer.step()
                    optimizer.zero_grad()
            if window == 0:
                accelerator.save_state(folder)
        accelerator.free_memory()
        return flat(model)


def test_accelerate_resumes_between_windows(worlds: Worlds, tmp_path: Path) -> None:
    whole = worlds(2).run(saved_between, str(tmp_path), False)
    resumed = worlds(2).run(saved_between, str(tmp_path), True)
    assert all(torch.equal(each, whole[0]) for each in (*whole, *resumed))


def in_trainer(rank: int, index: int, compress: bool) -> tuple[Tensor, list[dict[str, float]], int]:
    with accelerate_state(), counted() as buckets, tempfile.TemporaryDirectory() as folder:
        trainer = transformers_cases.trainer(TRAINER[index], Path(folder), compress)
        trainer.train()
        logged = [each for each in trainer.state.log_history if "loss" in each]
        return flat(trainer.model), logged, len(buckets)


@pytest.mark.parametrize("case", TRAINER, ids=str)
def test_trainer(worlds: Worlds, case: Any) -> None:
    index = TRAINER.index(case)
    ours, theirs = (worlds(2).run(in_trainer, index, compress) for compress in (True, False))
    for (found, logged, sent), (expected, their_logs, averaged) in zip(ours, theirs, strict=True):
        assert (sent, averaged > 0) == (0, True)
        assert torch.equal(found, ours[0][0])
        assert (found - expected).abs().max() <= 2 * case.tolerance * expected.abs().max()
        for mine, other in zip(logged, their_logs, strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4, nan_ok=True)
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4, nan_ok=True)


def in_lightning(rank: int, compress: bool, release: bool) -> tuple[Tensor, int]:
    with counted() as buckets, warnings.catch_warnings(), patch.dict(os.environ, LAUNCHED):
        warnings.simplefilter("ignore")  # of what Lightning thinks of this machine
        accumulation = FloraAccumulation({"state_dtype": "float32", "release": release})
        trainer = lightning_cases.trainer(
            [accumulation] if compress else [], devices=2, strategy="ddp", use_distributed_sampler=False
        )
        module = lightning_cases.Module(flora)
        data = lightning_cases.Batches().data
        trainer.fit(module, torch.stack(data)[rank::2])
        assert trainer.world_size == 2
        return flat(module), len(buckets)


@pytest.mark.parametrize("release", [True, False])
def test_lightning_ddp(worlds: Worlds, release: bool) -> None:
    ours, theirs = (worlds(2).run(in_lightning, compress, release) for compress in (True, False))
    for (found, sent), (expected, averaged) in zip(ours, theirs, strict=True):
        assert (sent, averaged > 0) == (0, True)
        assert torch.equal(found, ours[0][0])
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def mixed(rank: int) -> Any:
    """The order of preparing does not matter, and a model without a window is averaged as ever."""
    with accelerate_state():
        accelerator = FloraAccelerator(cpu=True, gradient_accumulation_steps=2)
        model, other = nn.Linear(8, 8), nn.Linear(8, 8)
        _, wrapped, untouched = accelerator.prepare(Flora(model.parameters(), lr=1e-3, ratio=2), model, other)
        found = wrapped.require_backward_grad_sync, untouched.require_backward_grad_sync
        accelerator.free_memory()
    return found


def test_only_models_with_a_window_are_held(worlds: Worlds) -> None:
    assert worlds(2).run(mixed) == [(False, True)] * 2


def in_lightning_saved(rank: int, folder: str) -> str:
    """A checkpoint after two of four micro-batches."""

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 1:
                trainer.save_checkpoint(f"{folder}/inside.ckpt")

    with warnings.catch_warnings(), patch.dict(os.environ, LAUNCHED):
        warnings.simplefilter("ignore")
        trainer = lightning_cases.trainer(
            [FloraAccumulation(), Saves()], devices=2, strategy="ddp", use_distributed_sampler=False
        )
        try:
            trainer.fit(lightning_cases.Module(flora), torch.stack(lightning_cases.Batches().data)[rank::2])
        except RuntimeError as error:
            return str(error)
    return "nothing was noticed"


def test_lightning_saves_between_windows(worlds: Worlds, tmp_path: Path) -> None:
    for said in worlds(2).run(in_lightning_saved, str(tmp_path)):
        assert "a checkpoint inside a window of several processes" in said


def lightning_epochs(rank: int, folder: str, epochs: int, resume: bool) -> tuple[Tensor, int]:
    """Epochs of the same windows, whatever the number of processes; saved at the end of the last."""
    size = torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(5)
    first = lightning_cases.Batches().data[0]
    data = torch.randint(int(first.max()) + 1, (4 * STEPS, *first.shape), generator=generator)
    with warnings.catch_warnings(), patch.dict(os.environ, LAUNCHED):
        warnings.simplefilter("ignore")  # of what Lightning thinks of this machine
        trainer = lightning_cases.trainer(
            [FloraAccumulation({"state_dtype": "float32"})],
            devices=size,
            strategy="ddp",
            use_distributed_sampler=False,
            max_epochs=epochs,
            accumulate_grad_batches=2 * STEPS // size,
        )
        module = lightning_cases.Module(flora)
        trainer.fit(module, data[rank::size], ckpt_path=f"{folder}/epoch.ckpt" if resume else None)
        if not resume and epochs == 1:
            trainer.save_checkpoint(f"{folder}/epoch.ckpt")
        return flat(module), trainer.global_step


def test_lightning_resumes_on_other_numbers_of_processes(worlds: Worlds, tmp_path: Path) -> None:
    """Bit for bit on as many, and as one would on twice as many."""
    folder = str(tmp_path)
    whole, steps = worlds(2).run(lightning_epochs, folder, 2, False)[0]
    worlds(2).run(lightning_epochs, folder, 1, False)
    for found, taken in worlds(2).run(lightning_epochs, folder, 2, True):
        assert (torch.equal(found, whole), taken) == (True, steps)
    for found, taken in worlds(4).run(lightning_epochs, folder, 2, True):
        assert taken == steps
        assert (found - whole).abs().max() <= 2e-6 * whole.abs().max()
