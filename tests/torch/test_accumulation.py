"""Every way to run a window with every way to end it equals exact accumulation where nothing is rounded."""

import pytest
import torch
from torch import nn

from floragrad import Flora, GradientAccumulator
from tests.torch.accumulation_cases import (
    ENDINGS,
    MAX_NORM,
    SCENARIOS,
    STEPS,
    WIDTH,
    Ending,
    Net,
    Scenario,
    accumulated,
    adamw,
    exact,
    flat,
    flora,
)

TOLERANCE = 1e-6
PLAIN, RELEASE = SCENARIOS[0], ENDINGS[0]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("ending", ENDINGS, ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_identity_equals_exact_accumulation(scenario: Scenario, ending: Ending) -> None:
    if not ending.clips and not scenario.in_backward:
        with pytest.raises(RuntimeError, match="construct the accumulator with clip=True"):
            accumulated(scenario, ending, state_dtype="float32")
        return
    found, norms = accumulated(scenario, ending, state_dtype="float32")
    expected, exact_norms = exact(scenario, ending)
    assert relative(found, expected) < TOLERANCE
    for norm, exact_norm in zip(norms, exact_norms, strict=True):
        assert norm.item() == pytest.approx(exact_norm.item(), rel=1e-5)
        assert exact_norm > MAX_NORM, "the bound must be felt"


@pytest.mark.parametrize("ending", [RELEASE, ENDINGS[4]], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"state_dtype": "int8"}, {"state_dtype": "bfloat16"}, {"ratio": 2}, {"rank": 8, "projection": "gaussian"}],
    ids=str,
)
def test_compressed_windows_descend(ending: Ending, options: dict) -> None:
    """Whatever is rounded or projected, the model learns about what exact accumulation learns."""
    scenario = Scenario("longer", lengths=(STEPS,) * 10, names_vocabulary=True)
    start = loss_of(scenario.model(), scenario)
    after = []
    for course in (accumulated(scenario, ending, **options)[0], exact(scenario, ending)[0]):
        model = scenario.model()
        torch.nn.utils.vector_to_parameters(course, model.parameters())
        after.append(loss_of(model, scenario))
    assert start - after[0] > 0.6 * (start - after[1]) > 0


def loss_of(model: nn.Module, scenario: Scenario) -> float:
    with torch.no_grad():
        return sum(model(tokens).item() for window in scenario.windows() for tokens in window)


@pytest.mark.parametrize("name", ["release-in-backward", "release-one-each-in-backward", "materialise"])
def test_one_step_keeps_nothing(name: str) -> None:
    """With steps=1 no sketch exists, and the trajectory is that of the bare optimizer."""
    ending = next(each for each in ENDINGS if each.name == name)
    model, twin = PLAIN.model(), PLAIN.model()
    optimizers = ending.optimizers(list(model.parameters()))
    bare = ending.optimizers(list(twin.parameters()))
    with GradientAccumulator(optimizers, 1) as accumulator:
        assert accumulator.report().state_bytes == 0
        assert all(entry.sketch is None for entry in accumulator._entries)
        for tokens in PLAIN.windows()[0]:
            accumulator.backward(model(tokens))
            assert accumulator.complete
            accumulator.step()
            twin(tokens).backward()
            for each in bare if isinstance(bare, list) else [bare]:
                each.step()
                each.zero_grad()
    assert torch.equal(flat(model), flat(twin))


def test_gradients_are_freed_as_they_appear() -> None:
    """When a hook made after ours runs, that parameter's gradient is gone."""
    model = Net()
    accumulator = GradientAccumulator(flora(model.parameters()), STEPS)
    left = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: left.append(param.grad))
    accumulator.backward(model(PLAIN.windows()[0][0]))
    assert left
    assert all(grad is None for grad in left)


def test_a_foreign_backward_drives_it() -> None:
    """A loop that owns loss.backward(), and knows where windows end, needs only micro_batch()."""
    scenario = Scenario("foreign", lengths=(3, 5))
    model = scenario.model()
    optimizer = flora(model.parameters())
    with GradientAccumulator(optimizer, STEPS, state_dtype="float32") as accumulator:
        for window in scenario.windows():
            for index, tokens in enumerate(window):
                with accumulator.micro_batch(weight=1.0, last=index == len(window) - 1):
                    (model(tokens) / len(window)).backward()
            assert accumulator.complete
            accumulator.clip_grad_norm_(MAX_NORM)
            accumulator.step()
    assert relative(flat(model), exact(scenario, RELEASE)[0]) < TOLERANCE


def test_begin_and_end_equal_the_context() -> None:
    model = PLAIN.model()
    with GradientAccumulator(flora(model.parameters()), STEPS, state_dtype="float32") as accumulator:
        for window in PLAIN.windows():
            for tokens in window:
                accumulator.begin_micro_batch()
                model(tokens).backward()
                accumulator.end_micro_batch()
            accumulator.clip_grad_norm_(MAX_NORM)
            accumulator.step()
    assert relative(flat(model), exact(PLAIN, RELEASE)[0]) < TOLERANCE


def test_materialised_gradients_serve_the_ordinary_loop() -> None:
    """When a window is complete ``.grad`` holds its mean: torch's own clip, step and zero_grad do the rest."""
    model = PLAIN.model()
    optimizer = adamw(model.parameters())
    with GradientAccumulator(optimizer, STEPS, state_dtype="float32") as accumulator:
        for window in PLAIN.windows():
            for tokens in window:
                accumulator.backward(model(tokens))
                if not accumulator.complete:
                    assert all(param.grad is None for param in model.parameters())
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
    assert relative(flat(model), exact(PLAIN, ENDINGS[4])[0]) < TOLERANCE


@pytest.mark.parametrize("ending", ENDINGS, ids=str)
def test_schedulers_are_read_live(ending: Ending, recwarn: pytest.WarningsRecorder) -> None:
    """A learning rate set between two micro-batches counts, and no scheduler complains."""
    model, twin = PLAIN.model(), PLAIN.model()
    ours, theirs = (ending.optimizers(list(each.parameters())) for each in (model, twin))
    ours, theirs = (each if isinstance(each, list) else [each] for each in (ours, theirs))
    schedules = [[torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in each] for each in (ours, theirs)]
    options = {**ending.options, "state_dtype": "float32"}
    with GradientAccumulator(ours[0] if len(ours) == 1 else ours, STEPS, **options) as accumulator:
        for window in PLAIN.windows():
            for tokens in window:
                accumulator.backward(model(tokens))
                (twin(tokens) / STEPS).backward()
            accumulator.step()
            for optimizer in theirs:
                optimizer.step()
                optimizer.zero_grad()
            for schedule in schedules[0] + schedules[1]:
                schedule.step()
    assert relative(flat(model), flat(twin)) < TOLERANCE
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_bfloat16_parameters_follow_the_exact_sum() -> None:
    """The window's mean is rounded to bfloat16 once, however many micro-batches it has."""
    param = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([param], lr=1.0)
    grads = torch.randn(16, 64, 64).bfloat16()
    with GradientAccumulator(optimizer, 16, state_dtype="float32", release=False) as accumulator:
        for grad in grads:
            accumulator.backward((param * grad).sum())
        assert param.grad is not None
        assert param.grad.dtype == torch.bfloat16
        mean = grads.double().mean(0)
        # One rounding to 8 significant bits, half a unit in the last place.
        assert ((param.grad.double() - mean).abs() <= mean.abs() * 2**-8).all()
        accumulator.step()


def test_a_parameter_that_never_had_a_gradient_is_left_alone() -> None:
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    before = flat(model[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    with GradientAccumulator(optimizer, 2) as accumulator:
        for _ in range(2):
            accumulator.backward(model[0](torch.ones(1, 8)).sum())
        accumulator.step()
    assert torch.equal(flat(model[1]), before)


def test_groups_added_and_parameters_unfrozen_later_are_taken_in() -> None:
    """At the next window; positions, and with them the random numbers, stay."""
    results = []
    for compress in (True, False):
        model, late = PLAIN.model(), nn.Linear(1, 200, bias=False)
        torch.nn.init.ones_(late.weight)
        model.up.weight.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)  # whose steps grow with the gradient
        accumulator = GradientAccumulator(optimizer, STEPS, state_dtype="float32") if compress else None
        for number, window in enumerate(PLAIN.windows()):
            if number == 1:
                model.up.weight.requires_grad_(True)
                optimizer.add_param_group({"params": late.parameters()})
            for tokens in window:
                loss = model(tokens) + late.weight.square().sum()
                if accumulator is None:
                    (loss / STEPS).backward()
                else:
                    accumulator.backward(loss)
            (optimizer if accumulator is None else accumulator).step()
            optimizer.zero_grad()
            late.zero_grad()
        if accumulator is not None:
            accumulator.close()
        results.append(torch.cat([flat(model), flat(late)]))
    assert relative(*results) < TOLERANCE


def test_channels_last_and_float64_parameters() -> None:
    for dtype in (torch.float32, torch.float64):
        conv = nn.Conv2d(16, 16, 3).to(dtype).to(memory_format=torch.channels_last)
        twin = nn.Conv2d(16, 16, 3).to(dtype)
        twin.load_state_dict(conv.state_dict())
        images = torch.randn(4, 2, 16, 6, 6, dtype=dtype)
        ours, theirs = torch.optim.SGD(conv.parameters(), lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
        with GradientAccumulator(ours, 4, state_dtype="float32") as accumulator:
            for image in images:
                accumulator.backward(conv(image.to(memory_format=torch.channels_last)).square().mean())
                (twin(image).square().mean() / 4).backward()
            accumulator.step()
            theirs.step()
        assert relative(flat(conv), flat(twin)) < TOLERANCE


def test_report_predicts_the_bytes() -> None:
    for options in ({}, {"state_dtype": "int8", "ratio": 3}, {"state_dtype": "bfloat16"}, {"rank": 4}):
        model = Net()
        with GradientAccumulator(flora(model.parameters()), STEPS, **options) as accumulator:
            report = accumulator.report()
            for row, entry in zip(report.rows, accumulator._entries, strict=True):
                actual = sum(buffer.nbytes for buffer in entry.sketch.buffers.values())
                assert row.state_bytes == actual, row
            assert report.exact_bytes == sum(4 * param.numel() for param in model.parameters())
            text = str(report)
            assert "vector: summed exactly" in text
            assert f"{report.state_bytes / report.exact_bytes:.1%}" in text


@pytest.mark.filterwarnings("ignore:Flora compresses 2% of the momentum")
def test_vocabulary_keeps_every_column() -> None:
    """By kind, or by shape where nobody says: 200 x 32 is too short for that, 8,200 x 32 is not."""
    model = Net()
    groups = [
        {"params": [("embed", nn.Parameter(torch.zeros(8200, WIDTH)))]},
        {"params": [("up", model.up.weight)], "kind": "vocabulary"},
        {"params": [("head", model.head.weight)]},
    ]
    with GradientAccumulator(Flora(groups, lr=1e-3, rank=8), 2, ratio=4) as accumulator:
        ratios = {row.name: row.ratio for row in accumulator.report().rows}
    assert ratios == {"embed": 1, "up": 1, "head": 4}
