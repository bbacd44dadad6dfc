"""FloraAccumulation against Lightning without it: the same parameters where nothing is rounded."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision

from floragrad import Flora
from floragrad.lightning import FloraAccumulation
from tests.torch.accumulation_cases import MAX_NORM, STEPS, Net, adamw, flat, flora

EXACT = {"state_dtype": "float32"}
BATCHES = 10  # two windows of four and one of two


class Batches:
    """A loader that knows where it stands, so that training goes on where it was interrupted."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.data = list(torch.randint(0, 200, (BATCHES, 2, 7), generator=generator))
        self.at = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Any:
        self.at %= BATCHES  # Lightning does not look for the end
        while self.at < BATCHES:
            self.at += 1
            yield self.data[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Module(LightningModule):
    """``skipped`` micro-batches give no loss, ``overflowing`` ones an infinite one."""

    def __init__(self, optimizer: Callable, skipped: tuple[int, ...] = (), overflowing: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        self.optimizer, self.skipped, self.overflowing = optimizer, skipped, overflowing
        self.losses: list[float] = []
        self.rates: list[float] = []

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor | None:
        loss = self.net(tokens)
        self.losses.append(loss.item())
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        if batch_idx in self.skipped:
            return None
        return loss * float("inf") if batch_idx in self.overflowing and self.current_epoch == 0 else loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer(self.net.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fp16() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))


OPTIONS = {
    "max_epochs": 2,
    "accumulate_grad_batches": STEPS,
    "gradient_clip_val": MAX_NORM,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


def trainer(callbacks: list[Callback], **options: Any) -> Trainer:
    saves = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Lightning thinks of this machine
        return Trainer(callbacks=callbacks, **{**OPTIONS, "enable_checkpointing": saves, **options})


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        name: The test's id.
        optimizer: Of the parameters.
        accumulation: Of FloraAccumulation, besides float32.
        options: Of the Trainer.
        plugin: Made for each Trainer.
        schedule: Of the micro-batches of a window, by epoch.
        module: What is special about the module.
        releases: Whether tensors are updated one by one.
        tolerance: Relative, of parameters and norms.
    """

    name: str
    optimizer: Callable = flora
    accumulation: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    plugin: Callable | None = None
    schedule: dict[int, int] | None = None
    module: dict[str, Any] = field(default_factory=dict)
    releases: bool = True
    tolerance: float = 1e-6

    def __str__(self) -> str:
        return self.name


NOT_CLIPPED, BF16 = {"gradient_clip_val": None}, {"precision": "bf16-mixed"}
BY_VALUE = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
SCHEDULE = {0: 1, 1: STEPS, 2: 3, 3: 1}
CASES = [
    Case("flora"),
    Case("flora-not-clipped", options=NOT_CLIPPED),
    # Norms are of sketches here, of gradients there. Their last bit turns roundings of bf16 in later steps.
    Case("flora-bf16", options=BF16, tolerance=2e-4),
    Case("flora-fp16", plugin=fp16, module={"overflowing": (5,)}, releases=False),
    Case("flora-skipped-steps", module={"skipped": (1, 7, 9)}),
    Case("flora-scheduled-windows", options={"accumulate_grad_batches": 1, "max_epochs": 4}, schedule=SCHEDULE),
    Case("flora-materialised", accumulation={"release": False}, releases=False),
    Case("adamw", adamw, releases=False),
    Case("adamw-not-clipped", adamw, options=NOT_CLIPPED, releases=False),
    Case("adamw-clipped-by-value", adamw, options=BY_VALUE, releases=False),
    Case("adamw-bf16", adamw, options=BF16, releases=False),
    Case("adamw-fp16", adamw, plugin=fp16, module={"overflowing": (5,)}, releases=False),
    Case("adamw-skipped-steps", adamw, module={"skipped": (1, 7, 9)}, releases=False),
]


class Norms(Callback):
    """The norm that each optimizer step has seen, and how many gradients there were in ``.grad``."""

    def __init__(self, ours: FloraAccumulation | None = None) -> None:
        self.ours, self.norms, self.held = ours, [], []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Module, optimizer: Any) -> None:
        grads = [param.grad for param in pl_module.parameters() if param.grad is not None]
        self.held.append(len(grads))
        if self.ours is not None and self.ours.grad_norm is not None:
            self.norms.append(self.ours.grad_norm.item())
        else:
            self.norms.append(torch.nn.utils.get_total_norm(grads).item())


def fitted(case: Case, compress: bool) -> tuple[Module, Norms]:
    module = Module(case.optimizer, **case.module)
    ours = FloraAccumulation({**EXACT, **case.accumulation}) if compress else None
    norms = Norms(ours)
    callbacks = [ours, norms] if ours else [norms]
    if case.schedule:
        callbacks.append(GradientAccumulationScheduler(case.schedule))
    options = {**case.options, **({"plugins": [case.plugin()]} if case.plugin else {})}
    trainer(callbacks, **options).fit(module, Batches())
    return module, norms


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_lightning(case: Case, recwarn: pytest.WarningsRecorder) -> None:
    (ours, found), (theirs, expected) = (fitted(case, compress) for compress in (True, False))
    assert ours.rates == theirs.rates
    assert len(ours.rates) == BATCHES * case.options.get("max_epochs", 2)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)
    assert found.norms == pytest.approx(expected.norms, rel=max(1e-5, case.tolerance), nan_ok=True)
    assert (flat(ours) - flat(theirs)).abs().max() <= case.tolerance * flat(theirs).abs().max()
    if case.schedule is None:
        assert not any(found.held) if case.releases else all(found.held)
    else:  # ten steps of one micro-batch, windows of 4, 4, 2 and of 3, 3, 3, 1, ten steps
        assert [held > 0 for held in found.held] == [True] * 10 + [False] * 7 + [True] * 10
    assert not [w for w in recwarn if "optimizer.step()" in str(w.message)]


def test_gradients_are_compressed_and_the_model_is_given_back() -> None:
    bits, held = [], []

    class Watch(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            rows = ours._window.report().rows
            bits.append({row.state_dtype for row in rows if len(row.shape) == 2})
            held.append(sum(param.grad is not None for param in module.parameters()))

    ours, module = FloraAccumulation(), Module(adamw)
    trainer([ours, Watch()], max_epochs=1).fit(module, Batches())
    assert bits == [{"int4"}] * BATCHES
    assert not any(held)
    module.net(Batches().data[0]).backward()
    assert all(param.grad is not None for param in module.parameters())


@pytest.mark.parametrize("optimizer", [flora, adamw])
@pytest.mark.parametrize("interrupt", [1, 3, 5], ids="after-batch-{}".format)
def test_resumed_bit_for_bit(optimizer: Callable, interrupt: int, tmp_path: Path) -> None:
    """Inside a window or between two, rounding and signs go on where they were."""

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, _module: Any, _outputs: Any, _batch: Any, index: int) -> None:
            if index == interrupt and trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    options = {"state_dtype": "int4", "ratio": 2}
    whole, resumed = Module(optimizer), Module(optimizer)
    trainer([FloraAccumulation(options), Save()]).fit(whole, Batches())
    trainer([FloraAccumulation(options)]).fit(resumed, Batches(), ckpt_path=tmp_path / "last.ckpt")
    assert len(resumed.losses) == BATCHES - interrupt - 1
    assert torch.equal(flat(resumed), flat(whole))


def test_checkpoint_callbacks_save_between_windows(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer([FloraAccumulation(), checkpoint], max_epochs=1).fit(Module(adamw), Batches())
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"]["FloraAccumulation"]["window"]
    assert (saved["window"], saved["seen"]) == (2, 0)
    assert not any(sketch["folds"] for sketch in saved["sketches"].values())


def test_a_run_that_was_stopped_in_a_window_goes_on_without_it() -> None:
    """As Lightning does, which zeroes gradients at the first micro-batch of an epoch."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, _module: Any, _outputs: Any, _batch: Any, index: int) -> None:
            trainer.should_stop = index == 5

    results = []
    for ours in ([FloraAccumulation(EXACT)], []):
        module = Module(flora)
        trainer([*ours, Stop()], max_epochs=1).fit(module, Batches())
        assert len(module.losses) == 6
        trainer(ours, max_epochs=1).fit(module, Batches())
        results.append(flat(module))
    assert (results[0] - results[1]).abs().max() <= 1e-6 * results[1].abs().max()


def test_a_failed_run_leaves_no_hooks() -> None:
    module = Module(flora)
    handle = module.net.up.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer([FloraAccumulation()]).fit(module, Batches())
    handle.remove()
    module.net(Batches().data[0]).backward()


class Manual(Module):
    automatic_optimization = False


class Clips(Module):
    def configure_gradient_clipping(self, optimizer: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), MAX_NORM)


@pytest.mark.parametrize(
    ("module", "accumulation", "options", "message"),
    [
        (Module, None, BY_VALUE, "'release': False"),
        (Module, {"release": True}, {"plugins": fp16}, "'release': False"),
        (Clips, None, NOT_CLIPPED, "'release': False"),
        (Manual, None, {**NOT_CLIPPED, "accumulate_grad_batches": 1}, "use floragrad.GradientAccumulator"),
        (Module, {"ratio": 0}, {}, "ratio=0"),
    ],
    ids=["by-value", "fp16", "own-clipping", "manual", "option"],
)
def test_refusals_name_the_way_out(module: type[Module], accumulation: Any, options: dict, message: str) -> None:
    given = {key: value() if callable(value) else value for key, value in options.items()}
    model = module(flora)
    with pytest.raises((RuntimeError, ValueError), match=message):
        trainer([FloraAccumulation(accumulation)], **given).fit(model, Batches())
    model.net(Batches().data[0]).backward()  # no hook is left
    if module is Clips:
        trainer([FloraAccumulation({"release": False})], **given).fit(model, Batches())


def test_strategies_that_accumulate_themselves_are_refused() -> None:
    run = trainer([])
    run.strategy.__class__ = type("Two", (type(run.strategy),), {"handles_gradient_accumulation": True})
    with pytest.raises(RuntimeError, match="devices=1"):
        FloraAccumulation().on_train_start(run, Module(flora))


class Plain(LightningModule):
    """Leaves its optimizer to LightningCLI."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(tokens)


def test_lightning_cli_makes_both_by_class_path() -> None:
    callback = {"class_path": "floragrad.lightning.FloraAccumulation", "init_args": {"accumulation": EXACT}}
    options = {"lr": 1e-2, "rank": None, "ratio": 2}
    config = {
        "trainer": {**OPTIONS, "callbacks": [callback]},
        "optimizer": {"class_path": "floragrad.Flora", "init_args": options},
    }
    cli = LightningCLI(Plain, args=config, run=False, save_config_callback=None)
    by_hand = Plain()
    by_hand.configure_optimizers = lambda: Flora(by_hand.parameters(), **options)
    for module, run in ((cli.model, cli.trainer), (by_hand, trainer([FloraAccumulation(EXACT)]))):
        run.fit(module, torch.stack(Batches().data))
        assert run.callbacks[0].accumulator.releases
    assert torch.equal(flat(cli.model), flat(by_hand))
    assert not torch.equal(flat(by_hand), flat(Plain()))
