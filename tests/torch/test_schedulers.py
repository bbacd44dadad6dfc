"""Schedulers of torch and transformers on Flora: what works on AdamW works here."""

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.optim import lr_scheduler
from transformers.optimization import AdafactorSchedule

from floragrad import Flora, GradientAccumulator, param_groups

STEPS = 6
RELATIVE: dict[str, Any] = {"relative_step": True}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))


def flora(model: nn.Module, **options: Any) -> Flora:
    return Flora(param_groups(model, lr=1e-3), rank=8, **options)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(param_groups(model, lr=1e-3), lr=1e-3)


def relative(model: nn.Module, **options: Any) -> Flora:
    return Flora(model.parameters(), rank=8, relative_step=True, **options)


def run(optimizer: torch.optim.Optimizer, model: nn.Module, make: Callable) -> list[list[float]]:
    """The learning rates that a scheduler gives over some steps."""
    schedule, rates = make(optimizer), []
    for _ in range(STEPS):
        model(torch.ones(2, 32)).square().mean().backward()
        optimizer.step()
        if "metrics" in inspect.signature(schedule.step).parameters:
            schedule.step(1.0)
        else:
            schedule.step()
        optimizer.zero_grad()
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
    return rates


def of_transformers(name: str) -> Callable:
    extra = {
        "cosine_with_min_lr": {"min_lr": 1e-5},
        "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
        "warmup_stable_decay": {"num_decay_steps": 2},
    }
    return lambda optimizer: transformers.get_scheduler(
        name, optimizer, num_warmup_steps=2, num_training_steps=STEPS, scheduler_specific_kwargs=extra.get(name)
    )


SCHEDULES: dict[str, Callable] = {
    **{each.value: of_transformers(each.value) for each in transformers.SchedulerType},
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, STEPS + 1),
    "OneCycleLR-without-momentum": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, STEPS + 1, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_adamws(name: str) -> None:
    results = []
    for make in (adamw, flora):
        model = net()
        results.append(run(make(model), model, SCHEDULES[name]))
    assert torch.allclose(*(torch.tensor(rates, dtype=torch.float64) for rates in results), rtol=1e-12)


@pytest.mark.parametrize("name", [*SCHEDULES, "AdafactorSchedule"])
def test_relative_step_under_any_schedule_is_that_without_one(name: str) -> None:
    """It derives the learning rate from the step, and a schedule that changes it is said to be ignored."""
    found, expected = net(), net()
    # None of what changes the momentum, which is not ignored.
    make = {**SCHEDULES, "AdafactorSchedule": AdafactorSchedule}[name]
    beta1 = None if "CyclicLR" in name or name == "OneCycleLR" else 0.9
    if beta1 is None:
        inner = {
            "OneCycleLR": (lr_scheduler.OneCycleLR, (1e-2, STEPS + 1)),
            "CyclicLR": (lr_scheduler.CyclicLR, (1e-4, 1e-2)),
        }
        kind, arguments = inner[name]
        make = lambda o: kind(o, *arguments, cycle_momentum=False)  # noqa: E731
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(relative(found, beta1=beta1), found, make)
    run(relative(expected, beta1=beta1), expected, lambda o: lr_scheduler.ConstantLR(o, 1.0))
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    told = [each for each in caught if "relative_step=True derives the learning rate" in str(each.message)]
    assert {each.filename for each in told} <= {__file__}, "it points at the caller of step()"
    assert len(told) == (name not in ("constant", "AdafactorSchedule", "reduce_lr_on_plateau", "greedy"))


@pytest.mark.parametrize("options", [{}, {"scale_parameter": True}, {"warmup_init": True}], ids=str)
def test_adafactor_schedule_reports_the_step_size(options: dict) -> None:
    """As of transformers' Adafactor, whose schedule it is; with the scale that the parameter has now."""
    results = []
    for kind in (Flora, transformers.Adafactor):
        model = net()
        given = {"rank": 8} if kind is Flora else {"lr": None, "scale_parameter": False}
        optimizer = kind(model.parameters(), **{**given, "relative_step": True, **options})
        schedule = AdafactorSchedule(optimizer)
        model(torch.ones(2, 32)).square().mean().backward()
        before = model[0].weight.detach().clone()
        optimizer.step()
        model[0].weight.data.copy_(before)  # Adafactor's scale is that of before the step
        schedule.step()
        results.append([float(lr) for lr in schedule.get_last_lr()])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parametrize("release", [True, False])
def test_cycled_momentum_is_beta1(name: str, release: bool) -> None:
    """The scheduler's momentum is used in every step: the run equals one whose beta1 is set by hand."""
    results, beta1s = [], []
    for by_scheduler in (True, False):
        model = net()
        optimizer = flora(model)
        schedule = SCHEDULES[name](optimizer)
        accumulator = GradientAccumulator(optimizer, 2, state_dtype="float32") if release else None
        for _ in range(STEPS):
            if not by_scheduler:
                for group in optimizer.param_groups:
                    group["beta1"] = group.pop("momentum")
            if accumulator is None:
                model(torch.ones(2, 32)).square().mean().backward()
                optimizer.step()
            else:
                for _ in range(2):
                    accumulator.backward(model(torch.ones(2, 32)).square().mean())
                accumulator.grad_norm  # noqa: B018
                accumulator.step()
            beta1s.append(optimizer.param_groups[0]["beta1"])
            schedule.step()
            optimizer.zero_grad()
        if accumulator is not None:
            accumulator.close()
        results.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert torch.equal(*results)
    assert beta1s[:STEPS] == beta1s[STEPS:]
    assert min(beta1s) < 0.9 < max(beta1s) or name == "CyclicLR"
    assert min(beta1s) < max(beta1s)


def test_without_a_momentum_there_is_none_to_cycle() -> None:
    model = net()
    with pytest.raises(ValueError, match="cycle_momentum"):
        lr_scheduler.OneCycleLR(flora(model, beta1=None), 1e-2, STEPS)
    cycled = flora(model)
    lr_scheduler.CyclicLR(cycled, 1e-4, 1e-2, base_momentum=0.0, max_momentum=0.0)
    model(torch.ones(2, 32)).square().mean().backward()
    with pytest.raises(ValueError, match="base_momentum > 0"):
        cycled.step()


def test_the_default_learning_rate_is_the_first_groups() -> None:
    model = net()
    optimizer = flora(model)
    assert optimizer.defaults["lr"] == 1e-3
    assert Flora(model.parameters(), lr=2e-3, rank=8).defaults["lr"] == 2e-3
    optimizer.add_param_group({"params": net().named_parameters()})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3] * len(optimizer.param_groups)
    assert all("momentum" not in group for group in optimizer.param_groups)


def test_the_options_of_relative_steps() -> None:
    model = net()
    for lr in (1e-3, 1e-2):
        with pytest.raises(ValueError, match=rf"lr={lr} and relative_step=True: .* give lr=None"):
            relative(model, lr=lr)
    optimizer = relative(model)
    assert optimizer.param_groups[0]["lr"] == optimizer.defaults["lr"] == 1e-2
    optimizer.add_param_group({"params": net().parameters(), "warmup_init": True})
    assert optimizer.param_groups[1]["lr"] == 1e-6
    with pytest.raises(ValueError, match="lr=None: give a learning rate"):
        optimizer.add_param_group({"params": net().parameters(), "relative_step": False})
    with pytest.raises(ValueError, match=r"lr=0\.5 and relative_step=True"):
        optimizer.add_param_group({"params": net().parameters(), "lr": 0.5})
    again = Flora([dict(group) for group in optimizer.param_groups], rank=8, relative_step=True)
    assert [group["lr"] for group in again.param_groups] == [1e-2, 1e-6]


def test_an_old_checkpoint_of_relative_steps_serves_schedulers() -> None:
    model = net()
    optimizer = relative(model)
    model(torch.ones(2, 32)).square().mean().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = None
    resumed = relative(model)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] == 1e-2
    run(resumed, model, lambda o: lr_scheduler.LambdaLR(o, lambda _: 1.0))


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR", "cosine_with_min_lr"])
def test_a_scheduled_run_resumes_bit_for_bit(name: str) -> None:
    def course(model: nn.Module, saved: dict | None, steps: int) -> dict:
        optimizer = flora(model)
        schedule = SCHEDULES[name](optimizer)
        if saved is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
        for _ in range(steps):
            model(torch.ones(2, 32)).square().mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        return {key: copy.deepcopy(part.state_dict()) for key, part in parts.items()}

    whole = course(net(), None, 4)["model"]
    resumed = course(net(), course(net(), None, 2), 2)["model"]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
