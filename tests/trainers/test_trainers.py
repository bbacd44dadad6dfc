"""Flora in trainers that are installed without their dependencies, by `make test-trainers`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from floragrad import Flora
from tests.distributed.cases import full
from tests.integrations.test_transformers import EXACT, OPTIONS, RATES, arguments, examples, flora, llama
from tests.torch.accumulation_cases import flat

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


def step(model: nn.Module, optimizer: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 64, (2, 8), generator=generator)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def group_of_one() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("sharded", [False, True])
def test_torchtitan_trains_and_resumes(sharded: bool, tmp_path: Path) -> None:
    """As Flora by hand, and bit for bit from a checkpoint that is keyed by names; under FSDP2 too."""
    from torchtitan.components.optimizer import LRSchedulersContainer

    from floragrad.torchtitan import FloraOptimizersContainer

    def made() -> dict[str, Any]:
        model = llama()
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizers = FloraOptimizersContainer.Config(**RATES, options=OPTIONS).build(model_parts=[model])
        schedule = LRSchedulersContainer.Config(warmup_steps=2, decay_ratio=0.0)
        schedulers = schedule.build(optimizers=optimizers, training_steps=4)
        return {"model": model, "optimizer": optimizers, "lr_scheduler": schedulers}

    def train(run: dict[str, Any], numbers: range) -> Tensor:
        for number in numbers:
            step(run["model"], run["optimizer"], number)
            run["lr_scheduler"].step()
        return torch.cat([full(param).detach().flatten() for param in run["model"].parameters()])

    whole = train(made(), range(4))
    model = llama()
    optimizer = flora(model)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 2))
    by_hand = train({"model": model, "optimizer": optimizer, "lr_scheduler": warmup}, range(4))
    assert (whole - by_hand).abs().max() <= 1e-6 * by_hand.abs().max()

    half = made()
    train(half, range(2))
    checkpoint.save(half, checkpoint_id=tmp_path)
    resumed = made()
    checkpoint.load(resumed, checkpoint_id=tmp_path)
    assert torch.equal(train(resumed, range(2, 4)), whole)


def test_torchtitans_llama_is_grouped_by_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchtitan.models.llama3 import model_registry

    from floragrad.torchtitan import FloraOptimizersContainer

    model = model_registry("debugmodel").model.build()
    (optimizer,) = FloraOptimizersContainer.Config(lr=1e-3, options={"rank": 32}).build(model_parts=[model])
    kinds = {group["kind"]: group["param_names"] for group in optimizer.param_groups}
    assert kinds["vocabulary"] == ["tok_embeddings.weight", "lm_head.weight"]
    assert optimizer.report().compressed == len(kinds["matrix"]) > 0
    with pytest.raises(ValueError, match="leave it out"):
        FloraOptimizersContainer.Config(lr=1e-3, param_groups=[object()]).build(model_parts=[model])


@pytest.mark.parametrize("release", [None, False])
def test_axolotls_trainer_has_flora_and_sketches(
    release: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plugin as axolotl registers and calls it; with float32 sketches, the numbers of its own accumulation."""
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    import floragrad.axolotl

    plugins = PluginManager.get_instance()
    plugins.register("floragrad.axolotl.FloraPlugin")
    assert "floragrad.axolotl.FloraArgs" in plugins.get_input_args()
    given = arguments(tmp_path, num_train_epochs=1, learning_rate=1e-2, weight_decay=0.1).to_dict()
    given = {name: value for name, value in given.items() if value is not None and not name.startswith("push_to_hub")}
    cfg = DictDefault(flora=OPTIONS, flora_accumulation={**EXACT, "release": release})

    def trained() -> Any:
        data = Dataset.from_list([{name: value.tolist() for name, value in each.items()} for each in examples()])
        args = AxolotlTrainingArguments(**given, embedding_lr=RATES["embedding_lr"])
        trainer = AxolotlTrainer(model=llama(), args=args, train_dataset=data)
        plugins.post_trainer_create(cfg, trainer)
        trainer.train()
        return trainer

    ours = trained()
    assert ours.accumulator.releases == (release is None)
    monkeypatch.setattr(floragrad.axolotl, "extend_trainer", lambda *_: None)
    plain = trained()
    assert type(plain) is AxolotlTrainer
    groups = [(group["kind"], group["initial_lr"], group["weight_decay"]) for group in plain.optimizer.param_groups]
    assert groups == [("matrix", 1e-2, 0.1), ("vocabulary", 3e-2, 0.1), ("vector", 1e-2, 0.0)]
    assert (flat(ours.model) - flat(plain.model)).abs().max() <= 1e-6 * flat(plain.model).abs().max()


def test_ms_swift_finds_the_optimizer_by_its_name(tmp_path: Path) -> None:
    from swift.optimizers import optimizers_map
    from swift.utils.utils import import_external_file

    (tmp_path / "flora_plugin.py").write_text("import floragrad.swift\n")
    import_external_file(str(tmp_path / "flora_plugin.py"))
    args = SimpleNamespace(learning_rate=1e-2, weight_decay=0.1, optim_args="rank=4, embedding_lr=3e-2")
    optimizer = optimizers_map["flora"](args, SimpleNamespace(model=llama())).create_optimizer()
    assert [(group["kind"], group["lr"], group["rank"]) for group in optimizer.param_groups] == [
        ("matrix", 1e-2, 4),
        ("vocabulary", 3e-2, 4),
        ("vector", 1e-2, 4),
    ]


def test_nemo_automodel_resolves_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_automodel.components.config import loader
    from nemo_automodel.components.optim.optimizer import build_optimizer, build_optimizer_config

    monkeypatch.setattr(loader, "ENABLE_USER_MODULES", True)  # NEMO_ENABLE_USER_MODULES=1
    config = build_optimizer_config(loader._resolve_target("floragrad.Flora"), {"lr": 1e-3, "rank": 4})
    (optimizer,) = build_optimizer(net(), config)
    assert type(optimizer) is Flora
    assert optimizer.report().compressed == 2


def test_litgpt_resolves_the_path() -> None:
    from litgpt.utils import instantiate_torch_optimizer

    given = {"class_path": "floragrad.Flora", "init_args": {"lr": 1e-3, "rank": 4, "weight_decay": 0.1}}
    optimizer = instantiate_torch_optimizer(given, net().parameters(), fused=True)  # as its scripts call it
    assert type(optimizer) is Flora
    assert optimizer.report().compressed == 2


def test_verl_resolves_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    # verl imports ray, which this function does not use.
    monkeypatch.setitem(sys.modules, "ray", MagicMock(__spec__=None, ObjectRef=object))
    from verl.workers.config.optimizer import FSDPOptimizerConfig, build_optimizer

    config = FSDPOptimizerConfig(
        optimizer="Flora", optimizer_impl="floragrad", lr=1e-3, override_optimizer_config={"rank": 4}
    )
    optimizer = build_optimizer(net().parameters(), config)
    assert type(optimizer) is Flora
    assert optimizer.report().compressed == 2
