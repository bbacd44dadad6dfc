"""Gradients and parameters that are not as an accumulator planned are refused by name, or folded as they read."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from floragrad import Flora, GradientAccumulator
from floragrad.policy import plan_accumulator
from floragrad.torch.accumulation.sketch import GradientSketch
from tests.torch.test_checkpoint import through_a_file
from tests.torch.test_validation import negated

pytestmark = pytest.mark.filterwarnings("ignore:Flora compresses no momentum")

OPTIMIZERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "release": lambda params: Flora(params, lr=1e-2, rank=4),
    "materialise": lambda params: torch.optim.SGD(params, lr=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 64)], ids=str)
def test_empty_parameters_take_part(shape: tuple[int, ...], optimizer: str, code: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.ones(24, 40))]
    with GradientAccumulator(OPTIMIZERS[optimizer](params), steps=2) as accumulator:
        for _ in range(2):
            accumulator.backward(params[0].sum() + params[1].square().sum())
        norm = accumulator.clip_grad_norm_(1e9)
        assert norm == pytest.approx(2 * (24 * 40) ** 0.5, rel=0.05)
        assert accumulator.step()
    assert params[0].shape == shape
    assert (params[1] < 1).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("shape", [(24, 40), (40,)], ids=str)
def test_a_resized_parameter_is_refused(shape: tuple[int, ...], steps: int, optimizer: str, code: str) -> None:
    param = torch.nn.Parameter(torch.ones(shape))
    with GradientAccumulator(
        OPTIMIZERS[optimizer]([param]), steps=steps, clip=True if optimizer == "release" else None
    ) as accumulator:
        param.data = torch.ones(3, *shape[1:])
        with pytest.raises(RuntimeError, match=r"parameter 0 has shape \(3.*but had \((24|40),.*construct"):
            accumulator.backward(param.sum())
        accumulator.zero_grad()
    assert torch.equal(param, torch.ones(3, *shape[1:]))


class Negated(torch.autograd.Function):
    """The identity, whose gradient comes with the negative bit."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return negated(grads[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_with_the_negative_bit_are_folded_as_they_read(steps: int, optimizer: str, code: str) -> None:
    def train(through: Callable[[Tensor], Tensor]) -> Tensor:
        param = torch.nn.Parameter(torch.ones(24, 40))
        weights = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
        with GradientAccumulator(OPTIMIZERS[optimizer]([param]), steps=steps) as accumulator:
            for _ in range(steps):
                accumulator.backward((through(param) * weights).sum())
            accumulator.step()
        return param.detach()

    assert torch.equal(train(lambda param: Negated.apply(param)), train(lambda param: param))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 2])
def test_zeros_without_memory_are_folded_as_zeros(steps: int, optimizer: str, code: str) -> None:
    param = torch.nn.Parameter(torch.ones(24, 40))
    param.register_hook(lambda grad: torch._efficientzerotensor(grad.shape))
    with GradientAccumulator(OPTIMIZERS[optimizer]([param]), steps=steps) as accumulator:
        for _ in range(steps):
            accumulator.backward(param.sum())
        assert accumulator.step()
    assert torch.equal(param, torch.ones(24, 40))


@pytest.mark.parametrize("state_dtype", ["int4", "float32"])
def test_sketches_take_nothing_but_what_they_planned(state_dtype: Any, code: str) -> None:
    plan = plan_accumulator((24, 130), ratio=2, state_dtype=state_dtype, kind="matrix")

    def sketch() -> GradientSketch:
        return GradientSketch(plan, "sign", 0, 0, torch.device("cpu"), name="weight")

    with pytest.raises(RuntimeError, match=r"gradient of weight has shape \(24, 129\).*not \(24, 130\)"):
        sketch().add(torch.ones(24, 129), 1.0, 0, measure_noise=True)
    with pytest.raises(RuntimeError, match=r"gradient of weight .*int64"):
        sketch().add(torch.ones(24, 130, dtype=torch.int64), 1.0, 0, measure_noise=True)
    harms: list[tuple[Callable[[Tensor], Tensor], str]] = [
        (lambda data: data[..., :-1], "has shape"),
        (lambda data: data.to(torch.float64), "float64"),
        (lambda data: data.expand(2, *data.shape)[0].transpose(1, 2).contiguous().transpose(1, 2), "not contiguous"),
    ]
    for harm, message in harms:
        broken = sketch()
        broken.add(torch.ones(24, 130), 1.0, 0, measure_noise=True)
        broken.buffers["data"] = harm(broken.buffers["data"])
        for work in (
            lambda each: each.add(torch.ones(24, 130), 1.0, 0, measure_noise=True),
            lambda each: each.decode_into(torch.ones(24, 130), 0, 1.0, 1.0),
            lambda each: each.squared_norm(),
        ):
            with pytest.raises(RuntimeError, match=rf"the sketch of weight: 'data'.*{message}"):
                work(broken)
    freed = sketch()
    freed.buffers["data"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"the sketch of weight: 'data'.*has no memory"):
        freed.add(torch.ones(24, 130), 1.0, 0, measure_noise=True)


@pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="torch before 2.10: gradients have their parameter's dtype"
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_keep_the_dtype_that_was_chosen_for_them(optimizer: str) -> None:
    """bfloat16 parameters with float32 gradients: .grad takes no other."""
    params = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((8, 64), (8,))]
    for param in params:
        param.grad_dtype = torch.float32  # type: ignore[attr-defined]
    accumulator = GradientAccumulator(OPTIMIZERS[optimizer](params), steps=2)
    for _ in range(2):
        accumulator.backward(sum(param.float().sum() for param in params))  # type: ignore[arg-type]
    if optimizer == "materialise":
        assert all(param.grad is not None and param.grad.dtype == torch.float32 for param in params)
    assert accumulator.step()
    assert all((param < 1).any() for param in params)
    accumulator.close()


def test_a_window_is_not_loaded_into_parameters_without_memory() -> None:
    param, empty = (torch.nn.Parameter(torch.ones(8, 64, device=device)) for device in ("cpu", "meta"))
    accumulator, other = (GradientAccumulator(Flora([each], lr=1e-2, rank=4), steps=2) for each in (param, empty))
    accumulator.backward(param.sum())
    with pytest.raises(ValueError, match="parameter 0 is on the meta device"):
        other.load_state_dict(accumulator.state_dict())


def test_integers_of_numpy_are_saved_as_those_of_python() -> None:
    param = torch.nn.Parameter(torch.ones(8, 64))
    accumulator = GradientAccumulator(Flora([param], lr=1e-2, rank=4), steps=np.int64(2), seed=np.int64(1))  # type: ignore[arg-type]
    accumulator.backward(param.sum())
    settings = through_a_file(accumulator.state_dict())["settings"]
    assert (settings["steps"], settings["seed"]) == (2, 1)


def test_a_step_that_broke_off_is_not_taken_again() -> None:
    """The first parameter is updated when the second is refused: it would be updated twice."""
    params = [torch.nn.Parameter(torch.ones(8, 64)) for _ in range(2)]
    optimizer = Flora(params, lr=1e-2, rank=4)
    accumulator = GradientAccumulator(optimizer, steps=1, clip=True)
    accumulator.backward(sum(param.sum() for param in params))  # type: ignore[arg-type]
    missing = optimizer.state[params[1]].pop("row_var")
    with pytest.raises(RuntimeError, match="'row_var'"):
        accumulator.step()
    optimizer.state[params[1]]["row_var"] = missing
    once = params[0].detach().clone()
    assert (once < 1).all()
    with pytest.raises(RuntimeError, match=r"step\(\) of this window failed.*zero_grad"):
        accumulator.step()
    assert torch.equal(params[0], once)
    accumulator.zero_grad()
    accumulator.backward(sum(param.sum() for param in params))  # type: ignore[arg-type]
    assert accumulator.step()
    assert (params[0] < once).all()
    accumulator.close()
