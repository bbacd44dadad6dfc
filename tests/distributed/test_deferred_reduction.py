"""FSDP2 whose gradients are folded before they are reduced: as those that FSDP2 reduces, with fewer bytes."""

import copy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from floragrad import Flora, GradientAccumulator
from floragrad.policy import MatrixView, plan_accumulator
from floragrad.torch.accumulation import reduce_scatter
from floragrad.torch.accumulation.reduce_scatter import ScatteredSketch, reduce_scatter_sketches
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.distributed.collectives import Ranks, to_local
from tests.distributed.cases import batch, full
from tests.distributed.conftest import Worlds
from tests.distributed.test_all_reduce import BOUND, WEIGHTS, gradients, ranks_here

STEPS, WINDOWS = 3, 3
MAX_NORM = 0.05


class Net(nn.Module):
    """Shards that are even, uneven and empty; a stack of matrices; a layer that not every micro-batch uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 130)
        self.second = nn.Linear(130, 7)
        self.side = nn.Linear(64, 7)
        self.experts = nn.Parameter(torch.randn(3, 7, 64) / 8)
        self.gain = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.ones(4, 64), requires_grad=False)

    def forward(self, inputs: Tensor, *, aside: bool = False) -> Tensor:
        out = self.second(torch.tanh(self.first(inputs))) * self.gain
        out = out + torch.einsum("bi,eoi->bo", inputs * self.frozen[0], self.experts)
        out = out + self.side(inputs) if aside else out
        return (out - inputs[:, :7]).square().mean()


def build(
    optimizer: str = "sgd", *, deferred: bool = True, bfloat16: bool = False, **options: Any
) -> tuple[Net, GradientAccumulator]:
    model = Net()
    policy = MixedPrecisionPolicy(torch.bfloat16 if bfloat16 else None, torch.float32)
    for module in (model.first, model.second, model.side, model):
        fully_shard(module, mp_policy=policy)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizers: Any = {
        "sgd": lambda: [torch.optim.SGD([param], lr=0.1) for param in params],
        "adamw": lambda: torch.optim.AdamW(params, lr=1e-2),
        "flora": lambda: Flora(params, lr=1e-2, ratio=2, kappa=2),
    }[optimizer]()
    deferral = {"defer_reduction": model} if deferred else {}
    return model, GradientAccumulator(optimizers, STEPS, **deferral, **options)


def go(model: Net, accumulator: GradientAccumulator, rank: int, numbers: range) -> list[float]:
    """Micro-batches, and the norms of their windows; ``side`` has a gradient in the second window, on rank 0."""
    norms = []
    for number in numbers:
        accumulator.backward(model(batch(number, rank), aside=number == STEPS + 1))
        if accumulator.complete:
            norms.append(accumulator.clip_grad_norm_(MAX_NORM).item())
            assert accumulator.step()
    return norms


def equals_reduced(rank: int) -> None:
    for optimizer, options in (
        ("sgd", {}),
        ("sgd", {"ratio": 2}),
        ("sgd", {"bfloat16": True}),
        ("adamw", {}),
        ("flora", {}),
    ):
        (model, deferred), (twin, reduced) = (
            build(optimizer, deferred=defers, state_dtype="float32", **options) for defers in (True, False)
        )
        with patch.object(distributed, "reduce_scatter_tensor") as reduce:
            norms = go(model, deferred, rank, range(WINDOWS * STEPS))
            reduce.assert_not_called()
        assert norms == pytest.approx(go(twin, reduced, rank, range(WINDOWS * STEPS)), rel=1e-5)
        assert max(norms) > MAX_NORM, "it was clipped"
        tolerance = (
            1e-5 if optimizer == "sgd" else 1e-3
        )  # of the largest; others magnify differences of small gradients
        for param, there in zip(model.parameters(), twin.parameters(), strict=True):
            assert (full(param) - full(there)).abs().max() <= tolerance * full(there).abs().max()


def frees(rank: int) -> None:
    """Nothing of the gradients stays but sketches; in few bits all ranks go on alike, and resume bit for bit."""
    model, accumulator = build("flora")
    accumulator.backward(model(batch(0, rank)))
    model.first.unshard()
    assert not isinstance(model.first.weight, torch.distributed.tensor.DTensor)
    assert model.first.weight.grad is None
    model.first.reshard()
    assert all(param.grad is None for param in model.parameters())
    rows = {row.shape: row for row in accumulator.report().rows}
    plan = plan_accumulator((130, 64))
    assert rows[130, 64].state_bytes == plan.state_bytes + plan_accumulator((65, 64)).state_bytes
    assert rows[130, 64].exact_bytes == 4 * 130 * 64
    accumulator.zero_grad()

    (whole, one), (first, two), (second, three) = (build("flora") for _ in range(3))
    expected = go(whole, one, rank, range(WINDOWS * STEPS))
    found = go(first, two, rank, range(STEPS + 1))
    with torch.no_grad():
        for param, there in zip(second.parameters(), first.parameters(), strict=True):
            to_local(param).copy_(to_local(there))
    flora, other = two._entries._optimizers[0], three._entries._optimizers[0]
    other.load_state_dict(copy.deepcopy(flora.state_dict()))
    three.load_state_dict(copy.deepcopy(two.state_dict()))
    assert found + go(second, three, rank, range(STEPS + 1, WINDOWS * STEPS)) == expected
    for param, there in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(to_local(param), to_local(there))
    # Columns' sizes are measured on the shards, and averaged over all rows: rounding needs the same on all ranks.
    with one.micro_batch():
        one.drop_micro_batch()
    measured = {entry.plan.shape: entry for entry in one._entries}
    for local, rows in (((65, 64), (65, 65)), ((4 - rank, 130), (4, 3))):
        entry = measured[local]
        assert entry.sketch is not None
        assert entry.unreduced is not None
        sizes = [torch.empty_like(entry.sketch.buffers["col_var"]) for _ in range(2)]
        distributed.all_gather(sizes, entry.sketch.buffers["col_var"])
        assert not torch.equal(*sizes)
        mean = sum(size * count for size, count in zip(sizes, rows, strict=True)) / sum(rows)
        torch.testing.assert_close(entry.unreduced.buffers["col_var"], mean)


def drops_and_refuses(rank: int) -> None:
    model, accumulator = build(state_dtype="float32")
    twin, other = build(state_dtype="float32")
    for number in range(STEPS):
        with accumulator.micro_batch():
            if number == 1:
                accumulator.drop_micro_batch()
            model(batch(number, rank)).backward()
        if number != 1:
            other.backward(twin(batch(number, rank)))
    assert other.flush()
    assert accumulator.grad_norm == other.grad_norm
    accumulator.zero_grad()
    with accumulator.micro_batch():
        model.gain.grad = torch.zeros_like(model.gain)
        with pytest.raises(RuntimeError, match=r"parameter 1 has a gradient in \.grad"):
            accumulator._fold_remaining()
        accumulator._window.failed = False
        model.gain.grad = None
    accumulator.zero_grad()
    accumulator.close()
    loss = model(batch(0, rank))
    loss.backward()
    assert model.gain.grad is not None, "close() gives the model back"
    with pytest.raises(ValueError, match="clip=False with defer_reduction"):
        build(clip=False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="a model without fully_shard"):
        GradientAccumulator(sgd, STEPS, defer_reduction=Net())
    with pytest.raises(ValueError, match="parameter 0 is no parameter of the model"):
        GradientAccumulator(sgd, STEPS, defer_reduction=twin.first)
    replicated = nn.Linear(64, 64)
    fully_shard(replicated, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")))
    with pytest.raises(ValueError, match="give fully_shard the mesh of the shards alone"):
        GradientAccumulator(torch.optim.SGD(replicated.parameters(), lr=0.1), STEPS, defer_reduction=replicated)


@pytest.mark.parametrize("job", [equals_reduced, frees, drops_and_refuses])
def test_two_processes(worlds: Worlds, job: Any) -> None:
    """See each function."""
    worlds(2).run(job)


DRAWS = 300
SHAPES = {(5, 20): (3, 2), (3, 4, 64): (2, 1), (5,): (3, 2)}
"""Rows on dimension 0 of each of two shards."""


def draws(rank: int, shape: tuple[int, ...], state_dtype: Any, ratio: int, bucket_bytes: int) -> dict[str, Tensor]:
    """Shards of summed sketches."""
    ranks: Ranks = ranks_here()
    options = {"ratio": ratio, "state_dtype": state_dtype}
    plan = plan_accumulator(shape, **options)
    batch, rows, columns = plan.view
    size = SHAPES[shape][rank]
    view = MatrixView(size, rows, columns) if batch > 1 else MatrixView(1, size, columns)
    local = replace(plan, shape=(size, *shape[1:]), view=view)
    whole = GradientSketch(plan, "sign", 0, 0, torch.device("cpu"), rank)
    # Rounding bits are those of a tensor of the shard's size: what matters here is that they are independent.
    shard = GradientSketch(local, "sign", 0, 0, torch.device("cpu"), 0)
    found: dict[str, list[Tensor]] = {"decoded": [], "square": []}
    for window in range(DRAWS):
        whole.folds = 0
        for grad, weight in zip(gradients(shape), WEIGHTS, strict=True):
            whole.add(grad, weight, window, measure_noise=True)
        with patch.object(reduce_scatter, "BUCKET_BYTES", bucket_bytes):
            reduce_scatter_sketches([ScatteredSketch.of(whole, shard, ranks)], window, ranks)
        found["square"].append(shard.squared_norm())
        found["decoded"].append(torch.empty(local.shape))
        shard.decode_into(found["decoded"][-1], window, grad_weight=0.0, factor=1.0)
    return {key: torch.stack(values).double() for key, values in found.items()}


@pytest.mark.parametrize(
    ("shape", "state_dtype", "ratio", "bucket_bytes"),
    [
        ((5, 20), "int4", 1, 2**20),
        ((5, 20), "bfloat16", 2, 2**20),
        ((3, 4, 64), "int4", 1, 30),
        ((3, 4, 64), "int8", 2, 2**20),
        ((5,), "float32", 1, 8),
    ],
    ids=str,
)
def test_sums_of_shards_are_unbiased(
    worlds: Worlds, shape: tuple[int, ...], state_dtype: str, ratio: int, bucket_bytes: int
) -> None:
    """The sum and its squared norm; bounds are five standard errors of the mean over the draws."""
    parts = worlds(2).run(draws, shape, state_dtype, ratio, bucket_bytes)
    decoded, square = torch.cat([part["decoded"] for part in parts], 1), sum(part["square"] for part in parts)
    exact = 2 * torch.einsum("i,i...->...", torch.tensor(WEIGHTS), gradients(shape)).double()
    for found, expected in ((decoded, exact), (square, exact.square().sum())):
        # Small elements are rounded up so rarely that the draws do not tell their variance: the mean one is larger.
        variance = found.var(0)
        error = BOUND * (variance.maximum(variance.mean()) / DRAWS).sqrt()
        assert ((found.mean(0) - expected).abs() <= error + 1e-5).all()
