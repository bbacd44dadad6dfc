"""Windows of several processes: as one process with all micro-batches, and the same on every rank, bit for bit."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from floragrad import Flora, GradientAccumulator
from tests.distributed.conftest import Worlds
from tests.torch.accumulation_cases import ENDINGS, MAX_NORM, STEPS, Ending, Net, flat

WINDOWS = 3
SHARED = [ending for ending in ENDINGS if ending.clips]


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net(gated=True)


def batches(rank: int, window: int, count: int = STEPS) -> list[Tensor]:
    """A rank's own; the parity of the first token says whether ``side`` has a gradient."""
    generator = torch.Generator().manual_seed(1000 * window + rank)
    found = [torch.randint(0, 200, (2, 7), generator=generator) for _ in range(count)]
    for number, tokens in enumerate(found):
        # In window 0 no rank uses it, in window 1 rank 0 alone does, once; then all, now and then.
        tokens[0, 0] = {0: 0, 1: int(rank == 0 and number == 1), 2: number % 2}[window]
    return found


def run_windows(model: nn.Module, ending: Ending, counts: list[list[Tensor]], **options: Any) -> tuple[Tensor, Tensor]:
    """The parameters after windows of these micro-batches, and the norms; ``steps`` is 4."""
    steps = options.pop("steps", STEPS)
    norms = []
    optimizers = ending.optimizers(list(model.parameters()))
    with GradientAccumulator(optimizers, steps, **{**ending.options, **options}) as accumulator:
        for window in counts:
            for tokens in window:
                accumulator.backward(model(tokens))
            assert accumulator.flush()
            norms.append(accumulator.clip_grad_norm_(MAX_NORM))
            assert accumulator.step()
            assert all(param.grad is None for param in model.parameters())
    return flat(model), torch.stack(norms)


def trained(rank: int, ending: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return run_windows(net(), SHARED[ending], [batches(rank, window) for window in range(WINDOWS)], **options)


def alone(ending: Ending, size: int, **options: Any) -> tuple[Tensor, Tensor]:
    """One process with all micro-batches, in windows that are longer by the number of ranks."""
    together = [[each for rank in range(size) for each in batches(rank, window)] for window in range(WINDOWS)]
    return run_windows(net(), ending, together, steps=size * STEPS, **{"release": None, **options})


@pytest.mark.parametrize("ending", SHARED, ids=str)
def test_exact_sums_equal_one_process(worlds: Worlds, ending: Ending) -> None:
    """Unused parameters too: nobody's in window 0, used on one rank in window 1."""
    results = worlds(2).run(trained, SHARED.index(ending), {"state_dtype": "float32"})
    expected, norms = alone(ending, 2, state_dtype="float32", **ending.options)
    for found, found_norms in results:
        assert torch.equal(found, results[0][0])
        # Sums of float32 in another order.
        assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
        torch.testing.assert_close(found_norms, norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": "float32", "ratio": 2},
        {"state_dtype": "float32", "ratio": 3, "projection": "gaussian"},
        {"state_dtype": "float32", "ratio": 2, "steps": 1},
    ],
    ids=str,
)
def test_projected_sums_equal_one_process(worlds: Worlds, options: dict[str, Any]) -> None:
    """All ranks draw the same projection and folding is linear: it does not matter who folds."""
    count = options.get("steps", STEPS)
    results = worlds(2).run(sgd_windows, count, options)
    together = [[each for rank in range(2) for each in batches(rank, w, count)] for w in range(WINDOWS)]
    expected = sgd_run(together, **{**options, "steps": 2 * count, "release": True})
    for found in results:
        assert torch.equal(found, results[0])
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def sgd_run(windows: list[list[Tensor]], **options: Any) -> Tensor:
    """Plain gradient descent, which does not blow up small differences."""
    model = net()
    one_each = Ending("", lambda params: [torch.optim.SGD([param], lr=0.1) for param in params])
    return run_windows(model, one_each, windows, **options)[0]


def sgd_windows(rank: int, count: int, options: dict[str, Any]) -> Tensor:
    return sgd_run([batches(rank, window, count) for window in range(WINDOWS)], **options)


def one_window(rank: int, state_dtype: Any) -> Tensor:
    """The mean gradient of one window, in ``.grad``."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientAccumulator(optimizer, STEPS, state_dtype=state_dtype) as accumulator:
        for tokens in batches(rank, 2):
            accumulator.backward(model(tokens))
        found = torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None])
        accumulator.zero_grad()
    return found


@pytest.mark.parametrize(("state_dtype", "step"), [("int4", 1 / 7), ("int8", 1 / 127), ("bfloat16", 2**-7)])
def test_rounded_sums_are_within_their_noise(worlds: Worlds, state_dtype: str, step: float) -> None:
    """Every rounding moves a number by less than a step: of each rank's partial sums, and of the sum in the end."""
    model = net()
    largest: dict[str, float] = dict.fromkeys(dict(model.named_parameters()), 0.0)
    mean = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    for rank in range(2):
        partial = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
        for tokens in batches(rank, 2):
            model.zero_grad()
            model(tokens).backward()
            for name, param in model.named_parameters():
                if param.grad is not None:
                    partial[name] += param.grad / (2 * STEPS)
                # A partial sum has been moved by less than a step of those before it, each no larger than this.
                largest[name] += partial[name].abs().max().item() * step * (1 + step) ** STEPS
        for name, value in partial.items():
            mean[name] += value
    results = worlds(2).run(one_window, state_dtype)
    assert torch.equal(*results)
    found = dict(zip(mean, results[0].split([each.numel() for each in mean.values()]), strict=True))
    for name, exact in mean.items():
        bound = largest[name] + step * (exact.abs().max().item() + largest[name])
        error = (found[name].view_as(exact) - exact).abs().max().item()
        assert error <= bound
        if exact.ndim == 2 and exact.shape[1] >= 64:
            assert error > 0, "it was rounded"


@pytest.mark.parametrize("size", [2, 4])
def test_few_bits_leave_all_ranks_alike(worlds: Worlds, size: int) -> None:
    results = worlds(size).run(trained, 0, {})
    assert all(torch.equal(found, results[0][0]) and torch.equal(norms, results[0][1]) for found, norms in results)
    start = flat(net())
    assert (results[0][0] - start).abs().max() > 1e-3, "and they have moved"


def sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Unlike Flora and AdamW it is sensitive to the size of gradients."""
    return [torch.optim.SGD([param], lr=0.5) for param in model.parameters()]


def cut_short(rank: int, counts: list[int], release: bool, weights: list[float] | None) -> tuple[Tensor, int]:
    """Windows of the rank's ``counts[rank]`` micro-batches in a row, the last flushed; how many there were."""
    model, windows = net(), 0
    with GradientAccumulator(sgd(model), 2, state_dtype="float32", release=release) as accumulator:
        for number, tokens in enumerate(batches(rank, 2, counts[rank])):
            accumulator.backward(model(tokens), weight=weights[number] if weights else None)
            if accumulator.complete:
                accumulator.step()
                windows += 1
        while accumulator.flush():
            accumulator.step()
            windows += 1
    return flat(model), windows


@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize(("counts", "windows"), [([1, 2], 1), ([2, 1], 1), ([0, 1], 1), ([5, 1], 3), ([0, 0], 0)])
def test_different_numbers_of_micro_batches(worlds: Worlds, counts: list[int], windows: int, release: bool) -> None:
    """Each window is the mean over all micro-batches that there were, on whatever rank."""
    results = worlds(2).run(cut_short, counts, release, None)
    assert torch.equal(results[0][0], results[1][0])
    assert [count for _, count in results] == [windows, windows]
    model = net()
    streams = [batches(rank, 2, counts[rank]) for rank in range(2)]
    for window in range(windows):
        here = [tokens for stream in streams for tokens in stream[2 * window : 2 * window + 2]]
        torch.stack([model(tokens) for tokens in here]).mean().backward()
        for optimizer in sgd(model):
            optimizer.step()
            optimizer.zero_grad()
    assert (results[0][0] - flat(model)).abs().max() < 1e-6 * flat(model).abs().max()


def test_weights_are_sums_averaged_over_ranks(worlds: Worlds) -> None:
    """What each rank gives is its weighted sum; a rank without a micro-batch gives zeros."""
    for counts in ([2, 2], [0, 2]):
        results = worlds(2).run(cut_short, counts, True, [0.3, 0.7])
        assert torch.equal(results[0][0], results[1][0])
        model = net()
        with GradientAccumulator(sgd(model), 4, state_dtype="float32") as window:
            for rank in range(2):
                for tokens, weight in zip(batches(rank, 2, counts[rank]), [0.3, 0.7], strict=False):
                    window.backward(model(tokens), weight=weight / 2)
            assert window.flush()
            window.step()
        assert (results[0][0] - flat(model)).abs().max() < 1e-6 * flat(model).abs().max()


def nobody_uses(rank: int) -> list[bool]:
    """Which parameters have a gradient at the end of a window in which one layer had none on any rank."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientAccumulator(optimizer, STEPS) as accumulator:
        for tokens in batches(rank, 0):
            accumulator.backward(model(tokens))
        found = [param.grad is not None for param in model.parameters()]
        accumulator.zero_grad()
    return found


def test_what_nobody_used_has_no_gradient(worlds: Worlds) -> None:
    for found in worlds(2).run(nobody_uses):
        assert found == [not name.startswith("side") for name, _ in net().named_parameters()]


def overflowing(rank: int, ending: int) -> list[tuple[bool, float, bool]]:
    """Windows of fp16; in the second, one rank's gradient is infinite."""
    model, found = net(), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = SHARED[ending].optimizers(list(model.parameters()))
    with GradientAccumulator(optimizers, 2, scaler=scaler, **SHARED[ending].options) as accumulator:
        for window in range(3):
            before = flat(model)
            for number, tokens in enumerate(batches(rank, 2, 2)):
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = model(tokens)
                accumulator.backward(loss * (torch.inf if (window, rank, number) == (1, 1, 0) else 1.0))
            stepped = accumulator.step()
            scaler.update()
            found.append((stepped, scaler.get_scale(), torch.equal(before, flat(model))))
    return found


@pytest.mark.parametrize("ending", [0, 1, 2], ids=lambda index: SHARED[index].name)
def test_infinity_on_one_rank_skips_the_window_on_all(worlds: Worlds, ending: int) -> None:
    expected = [(True, 2.0**10, False), (False, 2.0**9, True), (True, 2.0**9, False)]
    assert worlds(2).run(overflowing, ending) == [expected, expected]


class Wrapped:
    """A model in DistributedDataParallel, trained with the accumulator."""

    def __init__(self, **options: Any) -> None:
        self.inner = net()
        self.model = DistributedDataParallel(self.inner, **options)


WRAPPINGS: list[dict[str, Any]] = [
    {"gradient_as_bucket_view": view, **other}
    for view in (False, True)
    for other in ({}, {"find_unused_parameters": True})
]
STATIC = {"static_graph": True}
"""PyTorch refuses to begin it inside no_sync()."""


def within_no_sync(rank: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    wrapped, plain, found = Wrapped(**options), net(), []
    for model, run in ((wrapped.inner, wrapped.model), (plain, plain)):
        optimizer = Flora(model.parameters(), lr=1e-2, ratio=4)
        with GradientAccumulator(optimizer, STEPS) as accumulator:
            for window in range(WINDOWS):
                for tokens in batches(rank, window):
                    if run is wrapped.model:
                        with wrapped.model.no_sync():
                            accumulator.backward(run(tokens))
                    else:
                        accumulator.backward(run(tokens))
                accumulator.step()
        found.append(flat(model))
    return found[0], found[1]


@pytest.mark.parametrize("options", WRAPPINGS, ids=str)
def test_a_wrapped_model_within_no_sync(worlds: Worlds, options: dict[str, Any]) -> None:
    for wrapped, plain in worlds(2).run(within_no_sync, options):
        assert torch.equal(wrapped, plain)


def without_no_sync(rank: int, options: dict[str, Any], optimizer: str) -> str:
    wrapped = Wrapped(**options)
    kind = Flora if optimizer == "flora" else torch.optim.SGD
    with GradientAccumulator(kind(wrapped.inner.parameters(), lr=1e-2), 2) as accumulator:
        try:
            # As DistributedDataParallel's own accumulation is written: the last micro-batch is not in no_sync.
            with nullcontext() if options == STATIC else wrapped.model.no_sync():
                accumulator.backward(wrapped.model(batches(rank, 2)[1]))
            accumulator.backward(wrapped.model(batches(rank, 2)[1]))
        except RuntimeError as error:
            accumulator.zero_grad()
            return str(error)
    return "nothing was noticed"


@pytest.mark.parametrize("optimizer", ["flora", "sgd"])
@pytest.mark.parametrize("options", [*WRAPPINGS, STATIC], ids=str)
def test_a_wrapped_model_that_syncs_is_refused(worlds: Worlds, options: dict[str, Any], optimizer: str) -> None:
    for said in worlds(2).run(without_no_sync, options, optimizer):
        assert "has a gradient again after it was folded" in said
        assert "model.no_sync()" in said


def differing(rank: int, what: str) -> str:
    """Something is not alike on the ranks: every rank says so, and none waits for the other."""
    model = net()
    if what == "parameters" and rank == 1:
        model.head.requires_grad_(False)
    options = {"seed": rank} if what == "options" else {}
    accumulator = GradientAccumulator(Flora(model.parameters(), lr=1e-2), 2, **options)
    if what == "dropped" and rank == 1:
        accumulator.backward(model(batches(rank, 2)[0]))
        accumulator.zero_grad()
    try:
        for tokens in batches(rank, 2, 2):
            weight = 1.0 if what == "weights" and rank == 1 else None
            accumulator.backward(model(tokens), weight=weight)
    except (RuntimeError, ValueError) as error:
        accumulator.zero_grad()
        return str(error)
    finally:
        accumulator.zero_grad()
        accumulator.close()
    return "nothing was noticed"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("parameters", "the ranks differ in parameters or options"),
        ("options", "the ranks differ in parameters or options"),
        ("dropped", "the ranks differ in the number of the window: [0, 1]"),
        ("weights", "weights are given on some ranks only ([False, True])"),
    ],
)
def test_what_is_not_alike_is_named(worlds: Worlds, what: str, message: str) -> None:
    for said in worlds(2).run(differing, what):
        assert message in said


def updated_early(rank: int) -> str:
    try:
        GradientAccumulator(Flora(net().parameters(), lr=1e-2), 2, clip=False)
    except ValueError as error:
        return str(error)
    return "nothing was noticed"


def test_updates_inside_the_backward_pass_are_refused(worlds: Worlds) -> None:
    assert all("clip=False with 2 processes" in said for said in worlds(2).run(updated_early))


def not_a_member(rank: int) -> str:
    group = torch.distributed.new_group([0])
    try:
        GradientAccumulator(torch.optim.SGD(net().parameters(), lr=0.1), 2, process_group=group).close()
    except ValueError as error:
        return str(error)
    return "a member"


def test_a_group_without_this_process_is_refused(worlds: Worlds) -> None:
    member, other = worlds(2).run(not_a_member)
    assert member == "a member"
    assert "process_group is one that this process is not in" in other


def in_a_group_of_its_own(rank: int) -> Tensor:
    """A group of one rank trains alone; the default group of two does not."""
    groups = [torch.distributed.new_group([each]) for each in range(2)]
    model = net()
    with GradientAccumulator(
        Flora(model.parameters(), lr=1e-2, rank=8), STEPS, process_group=groups[rank]
    ) as accumulator:
        for tokens in batches(rank, 2):
            accumulator.backward(model(tokens))
        accumulator.step()
    return flat(model)


def test_a_group_of_one_rank_trains_alone(worlds: Worlds) -> None:
    for rank, found in enumerate(worlds(2).run(in_a_group_of_its_own)):
        model = net()
        with GradientAccumulator(Flora(model.parameters(), lr=1e-2, rank=8), STEPS) as accumulator:
            for tokens in batches(rank, 2):
                accumulator.backward(model(tokens))
            accumulator.step()
        assert torch.equal(found, flat(model))
