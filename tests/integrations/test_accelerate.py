"""FloraAccelerator against accelerate.Accelerator: the same loop, the same numbers where nothing is rounded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import DistributedType
from accelerate.utils import GradientAccumulationPlugin
from torch.utils.data import DataLoader

from floragrad import Flora, GradientAccumulator
from floragrad.torch.integrations.accelerate import FloraAccelerator
from tests.torch.accumulation_cases import MAX_NORM, STEPS, Net, adamw, flat, flora

EXACT = {"state_dtype": "float32"}
BATCHES = 10  # two windows of four and one of two


def with_scaler(accelerator: accelerate.Accelerator) -> accelerate.Accelerator:
    """Mixed precision of fp16, which Accelerate turns on for GPUs alone, on the CPU."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    accelerator.native_amp = True
    return accelerator


@dataclass(frozen=True)
class Case:
    """One way to write the loop.

    Attributes:
        name: The test's id.
        optimizer: Made of the parameters.
        accumulation: Of FloraAccelerator, besides float32.
        kwargs: Of either accelerator.
        epochs: Over the batches.
        clip: Whether the loop clips, and how it reads the norm.
        fp16: Whether there is a scaler, and which micro-batches overflow.
        passes: Backward passes of a micro-batch.
        tolerance: Relative, of parameters and norms.
    """

    name: str
    optimizer: Callable[..., torch.optim.Optimizer] = flora
    accumulation: dict[str, Any] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)
    epochs: int = 2
    clip: bool = True
    fp16: tuple[int, ...] | None = None
    passes: int = 1
    tolerance: float = 1e-6

    def __str__(self) -> str:
        return self.name


ADJUSTED = GradientAccumulationPlugin(num_steps=STEPS, sync_with_dataloader=False)
CASES = [
    Case("release"),
    Case("release-not-clipped", clip=False),
    Case("release-several-passes", passes=2),
    # Norms are of sketches here, of gradients there. Their last bit turns roundings of bf16 in later steps.
    Case("release-bf16", kwargs={"mixed_precision": "bf16"}, tolerance=2e-4),
    # Scale and clipping are one factor here, two there. Their last bit turns roundings of fp16 in later steps.
    Case("release-fp16", kwargs={"mixed_precision": "fp16"}, fp16=(), tolerance=2e-4),
    Case("release-fp16-overflow", kwargs={"mixed_precision": "fp16"}, fp16=(1, 7), tolerance=2e-4),
    Case("release-windows-across-epochs", kwargs={"gradient_accumulation_plugin": ADJUSTED}),
    Case("materialise-flora", accumulation={"release": False}),
    Case("materialise", adamw),
    Case("materialise-not-clipped", adamw, clip=False),
    Case("materialise-bf16", adamw, kwargs={"mixed_precision": "bf16"}),
    Case("materialise-fp16-overflow", adamw, kwargs={"mixed_precision": "fp16"}, fp16=(1, 7)),
]


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(torch.randint(0, 200, (2 * BATCHES, 7), generator=generator), batch_size=2)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def made(case: Case, compress: bool, **options: Any) -> accelerate.Accelerator:
    kwargs = {"cpu": True, **case.kwargs}
    if "gradient_accumulation_plugin" not in kwargs:
        kwargs["gradient_accumulation_steps"] = STEPS
    if compress:
        accelerator = FloraAccelerator(accumulation={**EXACT, **case.accumulation, **options}, **kwargs)
    else:
        accelerator = accelerate.Accelerator(**kwargs)
    return accelerator if case.fp16 is None else with_scaler(accelerator)


def trained(case: Case, accelerator: accelerate.Accelerator) -> dict[str, Any]:
    """What the ordinary loop leads to."""
    model = net()
    optimizer = case.optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
    # In any order of arguments.
    loader, optimizer, model, scheduler = accelerator.prepare(batches(), optimizer, model, scheduler)
    found: dict[str, Any] = {"norms": [], "losses": [], "rates": [], "skipped": [], "scale": None}
    number = 0
    for _ in range(case.epochs):
        for tokens in loader:
            with accelerator.accumulate(model):
                for _ in range(case.passes):
                    loss = model(tokens) / case.passes
                    if number in (case.fp16 or ()):
                        loss = loss * float("inf")
                    accelerator.backward(loss)
                if accelerator.sync_gradients and case.clip:
                    found["norms"].append(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM).item())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                found["losses"].append(loss.item())
                found["rates"].append(optimizer.param_groups[0]["lr"])
                found["skipped"].append(accelerator.optimizer_step_was_skipped)
            number += 1
    found["scale"] = accelerator.scaler.get_scale() if accelerator.scaler else None
    found["parameters"] = flat(model)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loop_equals_exact_accumulation(case: Case, recwarn: pytest.WarningsRecorder) -> None:
    found, expected = (trained(case, made(case, compress)) for compress in (True, False))
    for key in ("rates", "skipped", "scale"):
        assert found[key] == expected[key], key
    for key in ("norms", "losses", "parameters"):
        ours, theirs = torch.as_tensor(found[key]), torch.as_tensor(expected[key])
        scale = theirs[theirs.isfinite()].abs().max() if theirs.numel() else 1.0
        assert torch.allclose(ours / scale, theirs / scale, rtol=0, atol=case.tolerance, equal_nan=True), key
    assert not [w for w in recwarn if "optimizer.step()" in str(w.message)]
    assert any(expected["skipped"]) == bool(case.fp16)


def test_no_gradient_outlives_its_micro_batch() -> None:
    """With Flora not even at the end of a window; with AdamW from there to the step."""
    for optimizer, kept in ((flora, False), (adamw, True)):
        accelerator, model = made(CASES[0], True), net()
        model, prepared = accelerator.prepare(model, optimizer(model.parameters()))
        for number, tokens in enumerate(batches()):
            with accelerator.accumulate(model):
                accelerator.backward(model(tokens))
                there = [param.grad is not None for param in model.parameters()]
                assert all(there) if kept and number % STEPS == STEPS - 1 else not any(there)
                prepared.step()
                assert all(param.grad is None for param in model.parameters())
                prepared.zero_grad()
        accelerator.free_memory()


def test_none_keeps_four_bits_and_a_rank_keeps_columns() -> None:
    """As the first argument, by position, where flora-opt has it."""
    for rank, ratio in ((None, 1), (8, 32 // 8)):
        accelerator = FloraAccelerator(rank, gradient_accumulation_steps=STEPS, cpu=True)
        _, optimizer = accelerator.prepare(net(), flora(net().parameters()))
        rows = optimizer.window.report().rows
        matrices = [row for row in rows if row.shape == (80, 32)]
        assert [(row.ratio, row.state_dtype) for row in matrices] == [(ratio, "int4")]
        accelerator.end_training()


def test_compressed_windows_descend() -> None:
    losses = trained(Case("int4", epochs=4), made(CASES[0], True, state_dtype="int4"))["losses"]
    exact = trained(Case("exact", epochs=4), made(CASES[0], False))["losses"]
    assert losses[0] - losses[-1] > 0.6 * (exact[0] - exact[-1]) > 0


def test_without_accumulation_it_is_an_accelerator() -> None:
    accelerator, model = FloraAccelerator(8, cpu=True), net()
    model, optimizer = accelerator.prepare(model, flora(model.parameters()))
    assert type(optimizer) is accelerate.optimizer.AcceleratedOptimizer
    accelerator.backward(model(next(iter(batches()))))
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("optimizer", [flora, adamw])
@pytest.mark.parametrize("interrupt", [2, 4, 9], ids="after-{}".format)
def test_resumed_in_a_window_bit_for_bit(optimizer: Any, interrupt: int, tmp_path: Path) -> None:
    """Few bits and projections too: rounding and signs go on where they were."""

    def run(first: int, last: int, load: bool, save: bool) -> torch.Tensor:
        accelerator, model = made(CASES[0], True, state_dtype="int4", ratio=2), net()
        model, prepared = accelerator.prepare(model, optimizer(model.parameters()))
        if load:
            accelerator.load_state(str(tmp_path))
        for tokens in list(batches())[first:last]:
            with accelerator.accumulate(model):
                accelerator.backward(model(tokens))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                prepared.step()
                prepared.zero_grad()
        if save:
            accelerator.save_state(str(tmp_path))
        accelerator.end_training()
        return flat(model)

    whole = run(0, BATCHES, load=False, save=False)
    run(0, interrupt, load=False, save=True)
    assert torch.equal(run(interrupt, BATCHES, load=True, save=False), whole)


def test_a_state_goes_to_a_bare_optimizer_and_back() -> None:
    """The window's part is beside the optimizer's, which loads without it; a state without one drops the window."""
    accelerator, model = made(CASES[0], True), net()
    model, optimizer = accelerator.prepare(model, flora(model.parameters()))
    saved = optimizer.state_dict()
    bare = flora(net().parameters())
    bare.load_state_dict(saved)
    with accelerator.accumulate(model):
        accelerator.backward(model(next(iter(batches()))))
    assert optimizer.state_dict()["accumulation"]["seen"] == 1
    optimizer.load_state_dict(bare.state_dict())
    assert optimizer.state_dict()["accumulation"]["seen"] == 0


def test_zero_grad_drops_what_accelerate_would_zero() -> None:
    """At the end of a window all of it, before the end nothing."""
    accelerator, model = made(CASES[0], True), net()
    model, optimizer = accelerator.prepare(model, flora(model.parameters()))
    before = flat(model)
    for number, tokens in enumerate(list(batches())[:STEPS]):
        with accelerator.accumulate(model):
            accelerator.backward(model(tokens))
            optimizer.zero_grad()
            assert optimizer.state_dict()["accumulation"]["seen"] == (number + 1) % STEPS
            optimizer.step()
    assert torch.equal(flat(model), before)


def test_the_model_is_given_back() -> None:
    accelerator, model = made(CASES[0], True), net()
    _, optimizer = accelerator.prepare(model, flora(model.parameters()))
    with pytest.raises(RuntimeError, match="already"):
        GradientAccumulator(optimizer.optimizer, STEPS)
    with accelerator.accumulate(model):
        accelerator.backward(model(next(iter(batches()))))
    accelerator.free_memory()
    model(next(iter(batches()))).backward()
    assert all(param.grad is not None for param in model.parameters())
    assert "accumulation" not in optimizer.state_dict()
    model.zero_grad()
    assert accelerator.prepare(optimizer) is optimizer
    assert optimizer.window is not None


def test_a_pass_that_breaks_off_is_dropped_by_zero_grad() -> None:
    accelerator, model = made(CASES[0], True), net()
    model, optimizer = accelerator.prepare(model, flora(model.parameters()))
    tokens = next(iter(batches()))
    handle = model.up.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError), accelerator.accumulate(model):
        accelerator.backward(model(tokens))
    handle.remove()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) drops the window"):
        accelerator.backward(model(tokens))
    optimizer.zero_grad()
    accelerator.backward(model(tokens))
    assert optimizer.state_dict()["accumulation"]["seen"] == 1


def test_clipping_by_value_needs_gradients() -> None:
    for release in (True, False):
        accelerator, model = made(CASES[0], True, release=release), net()
        model, _ = accelerator.prepare(model, flora(model.parameters()))
        for tokens in list(batches())[:STEPS]:
            with accelerator.accumulate(model):
                accelerator.backward(model(tokens))
        if release:
            with pytest.raises(ValueError, match="'release': False"):
                accelerator.clip_grad_value_(model.parameters(), 1e-4)
        else:
            accelerator.clip_grad_value_(model.parameters(), 1e-4)
            assert max(param.grad.abs().max() for param in model.parameters()) <= 1e-4
        accelerator.free_memory()


def test_refusals_name_the_way_out() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        FloraAccelerator(4, accumulation={"rank": 4}, cpu=True)
    model = net()
    foreign = accelerate.Accelerator(cpu=True).prepare(flora(model.parameters()))
    accelerator = made(CASES[0], True)
    with pytest.raises(RuntimeError, match="prepare the bare optimizer"):
        accelerator.prepare(foreign)
    model, optimizer = accelerator.prepare(model, flora(model.parameters()))
    tokens = next(iter(batches()))
    with accelerator.accumulate(model):
        accelerator.backward(model(tokens))
        with pytest.raises(RuntimeError, match=r"if accelerator\.sync_gradients"):
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
    for _ in range(STEPS - 1):
        with accelerator.accumulate(model):
            accelerator.backward(model(tokens))
    with pytest.raises(ValueError, match="2-norm"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0, norm_type=1)
    with pytest.raises(ValueError, match="freeze what is not trained"):
        accelerator.clip_grad_norm_(model.up.parameters(), 1.0)
    with pytest.raises(ValueError, match="without a closure"):
        optimizer.step(lambda: None)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(RuntimeError, match=r"inside `with accelerator\.accumulate"):
        accelerator.backward(model(tokens))


def test_flat_parameters_are_refused() -> None:
    accelerator, model = made(CASES[0], True), net()
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel, FSDP2 .* or in one process"):
        accelerator.prepare_optimizer(flora(model.parameters()))


def test_flora_is_stepped_tensor_by_tensor() -> None:
    """Never are two gradients there at once."""
    accelerator, model = made(CASES[0], True), net()
    model, optimizer = accelerator.prepare(model, flora(model.parameters()))
    assert isinstance(optimizer.optimizer, Flora)
    held = []
    stepped = optimizer.optimizer.step_parameter

    def watch(param: torch.Tensor) -> None:
        held.append(sum(each.grad is not None for each in model.parameters()))
        stepped(param)

    optimizer.optimizer.step_parameter = watch
    for tokens in list(batches())[:STEPS]:
        with accelerator.accumulate(model):
            accelerator.backward(model(tokens))
            optimizer.step()
    assert held == [1] * len(list(model.parameters()))
