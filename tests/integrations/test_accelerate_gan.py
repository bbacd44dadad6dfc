"""Several models and optimizers in one accumulate(): as with accelerate.Accelerator, whatever the optimizers."""

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from floragrad.torch.integrations.accelerate import FloraAccelerator
from tests.torch.accumulation_cases import MAX_NORM, adamw, flat, flora

EXACT = {"state_dtype": "float32"}
STEPS = 3


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(32, 32), nn.Linear(32, 32)


def gan(accelerator: accelerate.Accelerator, optimizer: Callable, freeze: bool, clip: bool, every: int) -> torch.Tensor:
    """The parameters of both after some windows; the generator is trained in every so many micro-batches."""
    generator, critic = nets()
    generator, critic, ours, theirs = accelerator.prepare(
        generator, critic, optimizer(generator.parameters()), optimizer(critic.parameters())
    )
    noise = torch.Generator().manual_seed(1)
    for number in range(4 * STEPS):
        with accelerator.accumulate(generator, critic):
            fake = generator(torch.randn(4, 32, generator=noise))
            critic.requires_grad_(True)
            accelerator.backward((critic(fake.detach()) - 1).square().mean())
            if accelerator.sync_gradients and clip:
                accelerator.clip_grad_norm_(critic.parameters(), MAX_NORM)
            theirs.step()
            theirs.zero_grad()
            if number % every:
                continue
            critic.requires_grad_(not freeze)
            accelerator.backward(critic(fake).square().mean())
            if accelerator.sync_gradients and clip:
                accelerator.clip_grad_norm_(generator.parameters(), MAX_NORM)
            ours.step()
            ours.zero_grad()
    critic.requires_grad_(True)
    accelerator.end_training()
    return torch.cat([flat(generator), flat(critic)])


@pytest.mark.parametrize("optimizer", [flora, adamw])
@pytest.mark.parametrize(
    ("freeze", "clip", "every"), [(True, True, 1), (True, False, 1), (True, False, 2), (False, False, 1)]
)
def test_a_gan_equals_exact_accumulation(optimizer: Callable, freeze: bool, clip: bool, every: int) -> None:
    """A critic that is not frozen keeps the gradients of the generator's pass, as it does there."""
    kwargs: dict[str, Any] = {"gradient_accumulation_steps": STEPS, "cpu": True}
    found = gan(FloraAccelerator(accumulation=EXACT, **kwargs), optimizer, freeze, clip, every)
    expected = gan(accelerate.Accelerator(**kwargs), optimizer, freeze, clip, every)
    start = torch.cat([flat(each) for each in nets()])
    assert (expected - start).abs().max() > 1e-3
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_several_passes_with_any_optimizer() -> None:
    """After a window's last pass gradients are added to ``.grad``, as by any backward pass."""
    results = []
    for compress in (True, False):
        kwargs: dict[str, Any] = {"gradient_accumulation_steps": STEPS, "cpu": True}
        accelerator = FloraAccelerator(accumulation=EXACT, **kwargs) if compress else accelerate.Accelerator(**kwargs)
        model, _ = nets()
        model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
        for number in range(2 * STEPS):
            with accelerator.accumulate(model):
                for scale in (0.3, 0.7):
                    accelerator.backward(model(torch.full((2, 32), scale + number)).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
        results.append(flat(model))
        accelerator.end_training()
    assert (results[0] - results[1]).abs().max() < 1e-6 * results[1].abs().max()


def test_a_pass_after_unscaling_is_refused() -> None:
    """It would add scaled gradients to unscaled ones."""
    accelerator = FloraAccelerator(accumulation=EXACT, gradient_accumulation_steps=1 + 1, cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model, _ = nets()
    model, _ = accelerator.prepare(model, adamw(model.parameters()))
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 32)).square().mean())
    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
    with pytest.raises(RuntimeError, match="after the window's last one"):
        accelerator.backward(model(torch.ones(2, 32)).square().mean())
    accelerator.end_training()
