"""With the same projections, 25 steps over two epoch changes equal the float64 oracle's and PyTorch's."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch

from floragrad import Flora
from floragrad._streams import Stream
from floragrad.jax.leaf import Leaf, init_adaptive_weight
from floragrad.jax.options import resolve_options
from floragrad.jax.projection import BucketProjection, GaussianProjection, adaptive_noise
from floragrad.policy import TensorPlan
from floragrad.torch import adaptive, context, param_info
from floragrad.torch import projection as torch_projection
from floragrad.torch.options import resolve_group
from tests.jax.cases import as_kernel, build, kernel_axes, options, tensors, to_torch, torch_axes, trajectory
from tests.torch.cases import Case, cases
from tests.torch.conftest import eager as eager
from tests.torch.oracle import assert_same_course, reference_course

OF_MOMENTUM = ("rank", "ratio", "b1", "kappa", "projection", "residual", "seed", "embedding_momentum", "mu_dtype")
pytestmark = [pytest.mark.filterwarnings("ignore:Flora compresses no momentum"), pytest.mark.usefixtures("eager")]


def leaf_of(case: Case, shape: tuple[int, ...], **changes: Any) -> Leaf:
    """The only leaf of its optimizer, as the transformation makes it."""
    given = {"rank": None if "ratio" in case.options else 128, "ratio": None, "b1": 0.9, "projection": "sign"}
    given |= {"residual": None, "seed": 0, "embedding_momentum": "none"} | options(case)
    resolved = resolve_options(**{name: given[name] for name in OF_MOMENTUM}, **changes)
    ((layout, plan),) = resolved.plans(jax.ShapeDtypeStruct(shape, np.float32))
    return Leaf(resolved, layout, plan, 0)


class JaxDraws:
    """What JAX draws for one leaf, for the oracle."""

    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf
        # Compiled once: operation by operation, each one of every shape would be.
        self._matrix = jax.jit(lambda epoch: leaf.draw_projection(epoch).matrix())
        self._noise = jax.jit(lambda key: adaptive_noise(key, leaf.columns, leaf.plan.width))

    def projection(self, plan: TensorPlan, epoch: int) -> np.ndarray:
        return np.asarray(self._matrix(epoch), np.float64)

    def initial_weights(self, plan: TensorPlan) -> np.ndarray:
        weight = jax.jit(lambda: init_adaptive_weight(self.leaf, None))()
        return np.asarray(weight, np.float64).reshape(-1, self.leaf.columns)

    def noise(self, plan: TensorPlan, epoch: int) -> np.ndarray:
        key = self.leaf.key(epoch, Stream.ADAPTIVE_NOISE)
        return np.asarray(self._noise(key), np.float64)


def group_of(case: Case) -> dict[str, Any]:
    defaults = Flora([torch.nn.Parameter(torch.zeros(1))], lr=1.0).defaults
    return resolve_group(case.all_options(), dict(defaults))


def in_view(leaf: Leaf, arrays: np.ndarray) -> np.ndarray:
    """Arrays of the leaf's shape, stacked, as the oracle's (batch, m, n)."""
    view = leaf.layout.view
    if view is None:
        return arrays.reshape(len(arrays), 1, 1, -1).astype(np.float64)
    matrices = np.stack([np.asarray(leaf.layout.to_matrices(each)) for each in arrays])
    rows = matrices if leaf.layout.axis == -1 else np.swapaxes(matrices, -1, -2)
    return rows.reshape(len(arrays), *view).astype(np.float64)


# Each kind of shape and each projection has code of its own; most options are optax's code, with another number.
ORACLE = {
    *("wide", "k-does-not-divide-n", "one-bucket", "ratio-1", "convolution", "stacked-experts", "vector", "scalar"),
    *("vocabulary", "vocabulary-compressed", "paper-estimator", "adaptive-experts", "gaussian-experts"),
    *("no-momentum", "full-second-moment", "scale-parameter"),
}
PYTORCH = {"k-does-not-divide-n", "convolution", "vector", "adaptive-experts"}


@pytest.mark.parametrize("case", cases(quick=ORACLE), ids=str)
def test_equals_the_oracle(case: Case) -> None:
    """Kernels as JAX keeps them, (..., in, out)."""
    param, grads = tensors(case)
    param, grads = as_kernel(param), np.stack([as_kernel(grad) for grad in grads])
    axes = kernel_axes(case.shape)
    leaf, group = leaf_of(case, param.shape, matrix_axes=axes), group_of(case)
    found = trajectory(build(case, matrix_axes=axes), param, grads)
    plan = replace(leaf.plan, factored=leaf.plan.factored and group["factorize_second_moment"])
    start, *moves = in_view(leaf, np.stack([param, *grads]))
    expected = reference_course(plan, group, start, moves, JaxDraws(leaf))
    assert_same_course(case, list(in_view(leaf, found)), expected)


@pytest.mark.parametrize("case", cases(quick=PYTORCH), ids=str)
@pytest.mark.usefixtures("unoptimized")
def test_equals_pytorch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors as PyTorch keeps them, through ``matrix_axes``; PyTorch is given JAX's projections."""
    param, grads = tensors(case)
    axes = torch_axes(case.shape)
    leaf = leaf_of(case, case.shape, matrix_axes=axes)
    lend_projections(leaf, monkeypatch)
    found = trajectory(build(case, matrix_axes=axes), param, grads)
    theirs = case.parameter()
    optimizer = Flora([theirs], **case.all_options())
    expected = []
    for grad in case.gradients():
        theirs.grad = grad
        optimizer.step()
        expected.append(theirs.detach().double().numpy().copy())
    assert_same_course(case, list(found), expected)


class DenseProjection:
    """P as a matrix, for PyTorch."""

    def __init__(self, dense: torch.Tensor) -> None:
        self.dense = dense

    def encode(self, rows: torch.Tensor, _room: torch.Tensor | None = None) -> torch.Tensor:
        return rows @ self.dense.T

    def decode(self, sketch: torch.Tensor) -> torch.Tensor:
        return sketch @ self.dense

    def add_decoded_(self, rows: torch.Tensor, sketch: torch.Tensor) -> torch.Tensor:
        return rows.add_(self.decode(sketch))

    def transfer(self, sketch: torch.Tensor, previous: Any, *, orthogonal: bool) -> torch.Tensor:
        assert not orthogonal
        return self.encode(previous.decode(sketch))


def lend_projections(leaf: Leaf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch's optimizer draw what JAX draws."""

    @jax.jit
    def numbers(epoch: int) -> jax.Array:
        ours = leaf.draw_projection(epoch)
        if isinstance(ours, GaussianProjection):
            return ours.dense
        assert isinstance(ours, BucketProjection)
        return ours.weight

    def drawn(_: Any, epoch: int, *__: Any) -> Any:
        found = to_torch(numbers(epoch))
        if leaf.plan.projection == "gaussian":
            return DenseProjection(found)
        return torch_projection.BucketProjection.signs(leaf.columns, leaf.plan.width, found)

    def noise(ctx: context.StepContext, *_: Any) -> torch.Tensor:
        key = leaf.key(ctx.resample_index, Stream.ADAPTIVE_NOISE)
        return to_torch(adaptive_noise(key, leaf.columns, ctx.plan.width))

    def signs(*_: Any) -> torch.Tensor:
        return to_torch(numbers(0))

    monkeypatch.setattr(context.StepContext, "projection", drawn)
    monkeypatch.setattr(adaptive, "adaptive_noise", noise)
    monkeypatch.setattr(param_info, "random_signs", signs)
