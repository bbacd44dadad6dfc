"""Options, ownership, advice and lost accelerators of FloraAccelerator."""

import gc
from typing import Any

import pytest
import torch
from torch import nn

from floragrad import Flora, GradientAccumulator
from floragrad.torch.integrations.accelerate import FloraAccelerator
from tests.torch.accumulation_cases import adamw, flora

STEPS = 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(32, 32)


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.ones(2, 32)).square().mean()


def prepared(model: nn.Module, optimizer: Any = flora) -> tuple[FloraAccelerator, Any]:
    accelerator = FloraAccelerator(gradient_accumulation_steps=STEPS, cpu=True)
    _, made = accelerator.prepare(model, optimizer(model.parameters()))
    return accelerator, made


@pytest.mark.parametrize("optimizer", [flora, adamw])
def test_a_lost_accelerator_gives_the_model_back(optimizer: Any) -> None:
    """Without end_training(), in the middle of a window, and also where its optimizer is kept."""
    model, kept = net(), []
    for _ in range(2):
        accelerator, made = prepared(model, optimizer)
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model))
            made.step()
            made.zero_grad()
        kept.append(made)
        del accelerator, made
        gc.collect()
        loss_of(model).backward()
        expected = torch.autograd.grad(loss_of(model), list(model.parameters()))
        assert all(torch.equal(param.grad, grad) for param, grad in zip(model.parameters(), expected, strict=True))
        model.zero_grad()
    assert all(made.window is None for made in kept)


def test_backward_by_habit_is_answered_with_the_accelerator() -> None:
    model = net()
    accelerator, _ = prepared(model)
    with pytest.raises(RuntimeError, match=r"call accelerator\.backward\(loss\) instead of loss\.backward\(\)"):
        loss_of(model).backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"already: call end_training\(\) or free_memory\(\) of the accelerator"):
        prepared(model)
    accelerator.end_training()


def test_the_bare_optimizer_stepped_by_habit() -> None:
    model = net()
    bare = flora(model.parameters())
    accelerator = FloraAccelerator(gradient_accumulation_steps=STEPS, cpu=True)
    accelerator.prepare(bare)
    with pytest.warns(UserWarning, match=r"step the optimizer that accelerator\.prepare\(\) returned"):
        bare.step()
    accelerator.end_training()


@pytest.mark.parametrize("optimizer", [flora, adamw])
@pytest.mark.parametrize("model_is_prepared", [True, False])
def test_an_optimizer_that_owns_none_of_the_trained_tensors(optimizer: Any, model_is_prepared: bool) -> None:
    base, adapter = net(), net()
    base.requires_grad_(False)
    accelerator = FloraAccelerator(gradient_accumulation_steps=STEPS, cpu=True)
    made = accelerator.prepare(optimizer(base.parameters()))
    if model_is_prepared:
        adapter = accelerator.prepare(adapter)

    def window() -> None:
        for _ in range(STEPS):
            with accelerator.accumulate(adapter):
                accelerator.backward(loss_of(adapter))
                made.step()

    with pytest.raises((RuntimeError, ValueError), match="the parameters that are trained, after"):
        window()
    made.zero_grad()
    accelerator.end_training()


def test_an_optimizer_that_owns_some_of_the_trained_tensors() -> None:
    model = nn.Sequential(net(), net())
    accelerator = FloraAccelerator(gradient_accumulation_steps=STEPS, cpu=True)
    model, _ = accelerator.prepare(model, flora(model[0].parameters()))
    with pytest.raises(ValueError, match=r"1\.weight, 1\.bias: gradients of parameters that no optimizer trains"):
        accelerator.backward(loss_of(model))
    accelerator.end_training()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("int8", TypeError, r"accumulation='int8': give a dictionary .*\{'state_dtype': 'int8'\}"),
        (8, TypeError, "accumulation=8"),
        ({"state_dtpye": "int8"}, ValueError, "'state_dtpye': .* no such option; they are ratio, rank"),
    ],
)
def test_options_that_are_none(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FloraAccelerator(accumulation=given, gradient_accumulation_steps=STEPS, cpu=True)


def test_the_report_of_each_accumulator() -> None:
    first, second = net(), net()
    accelerator = FloraAccelerator(gradient_accumulation_steps=STEPS, cpu=True, accumulation={"state_dtype": "int8"})
    assert accelerator.accumulators == ()
    accelerator.prepare(first, second, flora(first.named_parameters()), adamw(second.parameters()))
    reports = [accumulator.report() for accumulator in accelerator.accumulators]
    assert [[row.state_dtype for row in report.rows] for report in reports] == [["int8", "float32"]] * 2
    assert reports[0].rows[0].name == "weight"
    accelerator.end_training()
    assert [accumulator.report() for accumulator in accelerator.accumulators] == reports
    accelerator.free_memory()
    assert accelerator.accumulators == ()


def test_one_step_has_no_accumulator() -> None:
    accelerator = FloraAccelerator(cpu=True)
    accelerator.prepare(Flora(net().parameters(), lr=1e-3, rank=8))
    assert accelerator.accumulators == ()


def test_closing_all_accumulators_of_a_model_serves_a_new_accelerator() -> None:
    model = net()
    kept = prepared(model)
    GradientAccumulator.close_all(model)
    accelerator, _ = prepared(model)
    accelerator.end_training()
    del kept


def test_an_optimizer_that_no_backward_pass_reaches_is_named() -> None:
    """With release: the zeros in .grad that notice clipping by habit are no gradient."""
    model, stranger = net(), net()
    accelerator, optimizer = prepared(model)
    for _ in range(STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(stranger))
    with pytest.raises(RuntimeError, match="no backward pass has reached a parameter of the optimizer"):
        optimizer.step()
