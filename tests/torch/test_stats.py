"""Metrics are those of the update that is made then; they change nothing, and cost nothing where nobody asks."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from floragrad import Flora, GradientAccumulator, param_groups
from floragrad.torch.backends.switch import SWITCH
from tests.torch.cases import CASES, Case

pytestmark = pytest.mark.filterwarnings("ignore:Flora compresses")
PLAIN = {"kappa": 2, "weight_decay": 0.0}


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("threshold", [1e9, 1e-3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_metrics_are_those_of_the_update(case: Case, threshold: float) -> None:
    """Of steps on any backend, a resampling one among them; parameters and states stay what they are without."""
    param, other = case.parameter(), case.parameter()
    options = case.all_options(**PLAIN, clip_threshold=threshold)
    optimizer, plain = Flora([param], **options), Flora([other], **options)
    optimizer.collect_stats()
    assert optimizer.stats() == {}
    for grad in case.gradients(3):
        before = param.detach().clone()
        param.grad, other.grad = grad.clone(), grad.clone()
        optimizer.step()
        plain.step()
        found, change = optimizer.stats(), (param - before).norm().item()
        assert found["grad_norm"] == pytest.approx(grad.norm().item(), rel=1e-5)
        assert found["param_norm"] == pytest.approx(before.norm().item(), rel=1e-5)
        rounding = 2**-23 * before.norm().item()  # of W, in float32
        assert found["update_norm"] == pytest.approx(change, rel=1e-4, abs=rounding)
        assert found["clipped"] == (found["update_rms"] > threshold)
        if not (options.get("scale_parameter") or options.get("relative_step")):
            bounded = min(found["update_rms"], threshold) * options["lr"] * param.numel() ** 0.5
            assert found["update_norm"] == pytest.approx(bounded, rel=1e-4)
        assert torch.equal(param, other)
    saved, expected = optimizer.state[param], plain.state[other]
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


@pytest.mark.parametrize("projection", ["sign", "adaptive"])
def test_the_sketchs_share_is_that_of_the_orthogonal_projection(projection: Any) -> None:
    """Of the first step's U, in float64, with P from what it encodes: the rows of the identity."""
    rows, columns, ratio = 24, 32, 4
    grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    param = nn.Parameter(torch.zeros(rows, columns))
    optimizer = Flora([param], lr=1.0, ratio=ratio, projection=projection, state_dtype="float32")
    optimizer.collect_stats()
    param.grad = grad.clone()
    optimizer.step()
    info, state = optimizer._infos[param], optimizer.state[param]
    if projection == "adaptive":
        from floragrad.torch.projection import BucketProjection

        basis = BucketProjection.normalised(state["projection_weight"].view(1, 1, columns), info.plan.width)
        encoded = basis.encode(torch.eye(columns)[None])[0].double().numpy()
    else:
        from floragrad.torch.context import StepContext

        ctx = StepContext(info.plan, info.group, info.tensor_id, 1, param.device, info.part)
        encoded = ctx.projection(0).encode(torch.eye(columns)[None])[0].double().numpy()
    exact = grad.double().numpy()
    row, col = (exact**2).mean(1, keepdims=True), (exact**2).mean(0)
    update = exact / np.sqrt(row / row.mean()) / np.sqrt(col)
    sketch = update @ encoded
    kept = np.sum(sketch @ np.linalg.inv(encoded.T @ encoded) * sketch)
    assert optimizer.stats()["sketch_energy"] == pytest.approx(kept / np.sum(update**2), rel=1e-5)


def test_random_signs_keep_one_part_in_ratio() -> None:
    param = nn.Parameter(torch.zeros(512, 512))
    optimizer = Flora([param], lr=1e-3, ratio=8)
    optimizer.collect_stats()
    param.grad = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert optimizer.stats()["sketch_energy"] == pytest.approx(1 / 8, rel=0.03)


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_nothing_is_computed_where_nobody_asks(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    """Neither before, nor after, nor between two measured steps; and no state is added."""
    monkeypatch.setenv(SWITCH, kernels)

    def step(optimizer: Flora) -> Counter[str]:
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        with Operations() as seen:
            optimizer.step()
        return seen.counts

    def fresh() -> Flora:
        return Flora([nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64))], lr=1e-3, rank=8)

    never, asked = fresh(), fresh()
    plain = [step(never) for _ in range(4)]
    asked.collect_stats(every=3)
    measured = [step(asked) for _ in range(4)]
    assert measured[1:3] == plain[1:3]
    assert measured[0].total() > plain[0].total()
    assert measured[3].total() > plain[3].total()
    asked.collect_stats(0)
    assert step(asked) == step(never)
    assert asked.state_dict()["state"][0].keys() == never.state_dict()["state"][0].keys()
    assert "_collector" not in vars(never)
    with pytest.raises(RuntimeError, match=r"collect_stats\(\)"):
        never.stats()


def test_groups_have_metrics_of_their_own() -> None:
    """Squares of norms add up; a group without gradients has none."""
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32), nn.LayerNorm(32))
    optimizer = Flora(param_groups(model, lr=1e-3, embedding_lr=1e-2), rank=8)
    optimizer.collect_stats()
    model[2].requires_grad_(False)
    model(torch.arange(8)).square().mean().backward()
    optimizer.step()
    found = optimizer.stats(by_group=True)
    assert [group["kind"] for group in optimizer.param_groups] == ["matrix", "vocabulary", "vector"]
    for name in ("grad_norm", "update_norm"):
        parts = [value for key, value in found.items() if key.endswith(f"/{name}")]
        assert found[name] == pytest.approx(np.linalg.norm(parts))
    assert {key for key in found if "sketch_energy" in key} == {"sketch_energy", "group0/sketch_energy"}


def test_updates_layer_by_layer_are_measured() -> None:
    """The accumulator's: the gradients are there one after the other."""
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    optimizer = Flora(model.parameters(), lr=1e-3, rank=8)
    optimizer.collect_stats()
    before = [param.detach().clone() for param in model.parameters()]
    with GradientAccumulator(optimizer, steps=2, state_dtype="float32") as accumulator:
        for batch in torch.randn(2, 8, 32):
            accumulator.backward(model(batch).square().mean())
        norm = accumulator.grad_norm
        accumulator.step()
    found = optimizer.stats()
    changes = [(param - old).norm().item() for param, old in zip(model.parameters(), before, strict=True)]
    assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert found["update_norm"] == pytest.approx(np.linalg.norm(changes), rel=1e-3)


@pytest.mark.parametrize("every", [-1, 1.5, True])
def test_a_wrong_distance_is_refused(every: Any) -> None:
    optimizer = Flora([nn.Parameter(torch.ones(4))], lr=1e-3)
    with pytest.raises(ValueError, match="every="):
        optimizer.collect_stats(every)
