"""Gradients put into ``.grad`` by hand, as from ``torch.autograd.grad``, count like those of a backward pass."""

import pytest
import torch
from torch import Tensor, nn

from floragrad import Flora, GradientAccumulator
from tests.torch.accumulation_cases import ENDINGS, MAX_NORM, STEPS, Ending, Net, Scenario, accumulated, exact, flat


class ByHand(nn.Module):
    """A model whose gradients are taken by ``autograd.grad``, and doubled; :meth:`backward` has nothing to do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(gated=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


def surgery(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    params = list(model.parameters())
    grads = torch.autograd.grad(2 * model(tokens), params, allow_unused=True)
    for param, grad in zip(params, grads, strict=True):
        if grad is not None:
            param.grad = grad
    return []


def doubled(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    return [2 * model(tokens)]


@pytest.mark.parametrize("ending", ENDINGS, ids=str)
@pytest.mark.parametrize("options", [{}, {"lengths": (STEPS, 2), "weights": (0.1, 0.4, 0.2, 0.3)}], ids=["mean", "sum"])
def test_they_are_folded_when_the_micro_batch_ends(ending: Ending, options: dict) -> None:
    given = {"lengths": (STEPS, 3), **options}
    found, norms = accumulated(Scenario("hand", ByHand, surgery, **given), ending, state_dtype="float32")
    expected, exact_norms = exact(Scenario("twin", ByHand, doubled, **given), ending)
    # As of any window: float32 sums in another order.
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    assert [norm.item() for norm in norms] == pytest.approx([norm.item() for norm in exact_norms], rel=1e-5)


@pytest.mark.parametrize("ending", ENDINGS, ids=str)
def test_windows_of_one_step_are_those_of_the_bare_optimizer(ending: Ending) -> None:
    """Not multiplied by 0."""
    results = []
    for compress in (True, False):
        torch.manual_seed(0)
        model, tokens = Net(), torch.arange(14).view(2, 7)
        made = ending.optimizers(list(model.parameters()))
        if compress:
            with GradientAccumulator(made, 1, **ending.options, state_dtype="float32") as accumulator:
                with accumulator.micro_batch():
                    surgery(model, tokens)
                accumulator.step()
        else:
            surgery(model, tokens)
            for optimizer in made if isinstance(made, list) else [made]:
                optimizer.step()
        results.append(flat(model))
    torch.manual_seed(0)
    assert (results[1] - flat(Net())).abs().max() > 1e-3
    assert (results[0] - results[1]).abs().max() < 1e-6 * results[1].abs().max()


def begun(model: nn.Module, micro_batches: int, **options: object) -> GradientAccumulator:
    optimizer = Flora(model.parameters(), lr=1e-3, rank=8)
    accumulator = GradientAccumulator(optimizer, 2, state_dtype="float32", **options)
    for _ in range(micro_batches):
        accumulator.backward(loss_of(model))
    return accumulator


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.ones(2, 32)).square().mean()


def test_some_by_hand_and_others_by_a_backward_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    accumulator = begun(model, 0, release=False)
    by_hand = [torch.full_like(param, 0.5) for param in model[0].parameters()]
    for _ in range(2):
        with accumulator.micro_batch():
            hidden = model[0](torch.ones(2, 32)).detach()
            model[1](hidden).square().mean().backward()
            for param, grad in zip(model[0].parameters(), by_hand, strict=True):
                param.grad = grad
    expected = torch.autograd.grad(model[1](hidden).square().mean(), list(model[1].parameters()))
    for param, grad in zip(model.parameters(), [*by_hand, *expected], strict=True):
        assert torch.allclose(param.grad, grad, rtol=1e-6, atol=0)
    accumulator.close()


def test_a_gradient_set_between_two_micro_batches_is_refused_before_it_is_lost() -> None:
    model = nn.Linear(32, 32)
    for call in ("begin_micro_batch", "flush"):
        with begun(model, 1) as accumulator:
            model.weight.grad = torch.ones(32, 32)
            with pytest.raises(RuntimeError, match=r"parameter 0 has a gradient that no backward pass .* has seen"):
                getattr(accumulator, call)()
            model.weight.grad = None
            assert accumulator.flush()
            accumulator.step()


@pytest.mark.parametrize("options", [{}, {"clip": False}], ids=["clip", "in-backward"])
def test_a_gradient_set_after_a_released_window_is_refused(options: dict) -> None:
    """It would be overwritten by the window's mean."""
    model = nn.Linear(32, 32)
    before = flat(model)
    with begun(model, 2, **options) as accumulator:
        done = flat(model)
        assert torch.equal(before, done) == (not options)
        model.bias.grad = torch.ones(32)
        with pytest.raises(
            RuntimeError, match=r"parameter 1 has a gradient that no backward pass .* inside micro_batch"
        ):
            accumulator.step()
        assert torch.equal(flat(model), done)
        model.bias.grad = None
        accumulator.step()


def test_a_gradient_by_hand_after_an_update_inside_the_backward_pass_is_refused() -> None:
    model = nn.Linear(32, 32)
    accumulator = begun(model, 1, clip=False)
    accumulator.begin_micro_batch()
    loss_of(model).backward()
    model.weight.grad = torch.ones(32, 32)
    with pytest.raises(RuntimeError, match=r"put into \.grad by hand; construct the accumulator with clip=True"):
        accumulator.end_micro_batch()


def test_a_hook_made_later_that_puts_a_gradient_back_is_named() -> None:
    model = nn.Linear(32, 32)
    accumulator = begun(model, 1)
    model.weight.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", torch.ones(32, 32)))
    with pytest.raises(RuntimeError, match="register the hook before the accumulator is made"):
        accumulator.backward(loss_of(model))


def test_a_hook_made_before_may_replace_the_gradient() -> None:
    model = nn.Linear(32, 32, bias=False)
    model.weight.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", torch.full((32, 32), 3.0)))
    with begun(model, 2, release=False) as accumulator:
        assert torch.equal(model.weight.grad, torch.full((32, 32), 3.0))
        accumulator.step()


def test_gradients_of_others_are_left_alone() -> None:
    model, other = nn.Linear(32, 32), nn.Linear(32, 32)
    with begun(model, 0) as accumulator:
        for _ in range(2):
            with accumulator.micro_batch():
                (loss_of(model) + loss_of(other)).backward()
        accumulator.step()
    expected = torch.autograd.grad(2 * loss_of(other), list(other.parameters()))
    assert all(torch.equal(param.grad, grad) for param, grad in zip(other.parameters(), expected, strict=True))


def test_by_hand_with_a_scaler_it_is_of_the_scaled_loss() -> None:
    results = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**8), None):
        torch.manual_seed(0)
        model = nn.Linear(32, 32)
        with begun(model, 0, scaler=scaler) as accumulator:
            for _ in range(2):
                with accumulator.micro_batch():
                    loss = loss_of(model) if scaler is None else scaler.scale(loss_of(model))
                    model.weight.grad, model.bias.grad = torch.autograd.grad(loss, [model.weight, model.bias])
            norm = accumulator.clip_grad_norm_(MAX_NORM)
            accumulator.step()
        results.append((flat(model), norm.item()))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
