"""What the Trainer and Lightning say in their own words: reports, ownership, options, habits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from floragrad import Flora
from floragrad.torch.integrations.lightning import FloraAccumulation
from floragrad.torch.integrations.transformers import FloraTrainer
from tests.integrations.test_lightning import Batches, Module, trainer
from tests.integrations.test_transformers import arguments, examples, flora, llama
from tests.torch.accumulation_cases import adamw, flat
from tests.torch.accumulation_cases import flora as flora_of


def made(folder: Path, model: torch.nn.Module, optimizer: Any, kind: type = FloraTrainer, **given: Any) -> FloraTrainer:
    options = arguments(folder, num_train_epochs=1, **given)
    return kind(model, options, train_dataset=examples(), optimizers=(optimizer, None))


@pytest.mark.parametrize("given", ["int8", {"state_dtpye": "int8"}], ids=str)
def test_options_that_are_none(given: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="accumulation="):
        FloraTrainer(llama(), arguments(tmp_path), accumulation=given)
    with pytest.raises((TypeError, ValueError), match="accumulation="):
        FloraAccumulation(given)


def test_the_trainers_report(tmp_path: Path) -> None:
    model = llama()
    run = made(tmp_path, model, flora(model))
    assert run.accumulator is None
    run.train()
    assert run.accumulator is not None
    assert {row.name for row in run.accumulator.report().rows} == {name for name, _ in model.named_parameters()}


def test_the_callbacks_report() -> None:
    callback, module = FloraAccumulation(), Module(adamw)
    assert callback.accumulator is None
    trainer([callback], max_epochs=1).fit(module, Batches())
    assert callback.accumulator is not None
    assert len(callback.accumulator.report().rows) == len(list(module.parameters()))


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_trainer_whose_optimizer_owns_none_of_the_trained_tensors(max_grad_norm: float, tmp_path: Path) -> None:
    """As with a ready-made optimizer and adapters that come later."""
    model, base = llama(), llama()
    base.requires_grad_(False)
    optimizer = Flora(base.named_parameters(), lr=1e-2, rank=4)
    run = made(tmp_path, model, optimizer, max_grad_norm=max_grad_norm)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight, .* no optimizer trains; .*peft_config"):
        run.train()


class Partly(Module):
    def configure_optimizers(self) -> Any:
        return self.optimizer(self.net.up.parameters())


@pytest.mark.parametrize("optimizer", [flora_of, adamw])
def test_a_module_whose_optimizer_owns_some_of_the_trained_tensors(optimizer: Any) -> None:
    module = Partly(optimizer)
    with pytest.raises(ValueError, match=r"net\.embed\.weight, .* no optimizer trains"):
        trainer([FloraAccumulation()]).fit(module, Batches())


def test_backward_by_habit_in_a_training_step(tmp_path: Path) -> None:
    class Habit(FloraTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = self.compute_loss(model, inputs)
            loss.backward()
            return loss.detach()

    model = llama()
    with pytest.raises(RuntimeError, match=r"call self\.accelerator\.backward\(loss\) .* in training_step"):
        made(tmp_path, model, flora(model), Habit).train()

    class Both(Module):
        def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.net(tokens).backward()
            return super().training_step(tokens, batch_idx)

    with pytest.raises(RuntimeError, match="return the loss from training_step"):
        trainer([FloraAccumulation()]).fit(Both(flora_of), Batches())


class Zeroes(Module):
    def on_after_backward(self) -> None:
        for param in self.parameters():
            if param.grad is not None:
                param.grad.nan_to_num_()


class Poisoned(Module):
    """One micro-batch of a window has gradients of NaN, but a finite loss."""

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(tokens, batch_idx)
        if batch_idx == 1:
            loss.register_hook(lambda grad: grad * float("nan"))
        return loss


def test_hooks_that_look_for_gradients_are_warned_once() -> None:
    with pytest.warns(
        UserWarning, match=r"on_after_backward of Zeroes will find no gradient.*drop_nonfinite"
    ) as caught:
        trainer([FloraAccumulation()]).fit(Zeroes(flora_of), Batches())
    assert sum("will find no gradient" in str(each.message) for each in caught) == 1


@pytest.mark.parametrize("optimizer", [flora_of, adamw])
def test_lightning_drops_what_is_not_finite(optimizer: Any) -> None:
    results = []
    for kind in (Poisoned, Module):
        module = kind(optimizer, skipped=() if kind is Poisoned else (1,))
        options = {"state_dtype": "float32", "drop_nonfinite": True}
        trainer([FloraAccumulation(options)], max_epochs=1).fit(module, Batches())
        results.append(flat(module))
    assert results[0].isfinite().all()
    assert torch.equal(*results)
