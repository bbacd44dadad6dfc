"""Which tensors are compressed, how far, why not, and in how many bytes: counted here a second time, by hand."""

import ast
import sys
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from floragrad import Flora, policy
from floragrad.policy import MatrixView, TensorPlan, matrix_view, plan_accumulator, plan_tensor

STORAGE = ("float32", "bfloat16", "int8", "int4")


# --- The view ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((6, 4), (1, 6, 4)),
        ((1, 1), (1, 1, 1)),
        ((50257, 768), (1, 50257, 768)),
        # Convolutions: the last dimension is a kernel's.
        ((64, 3, 7, 7), (1, 64, 147)),
        ((64, 32, 3), (1, 64, 96)),
        ((8, 4, 3, 5, 31), (1, 8, 4 * 3 * 5 * 31)),
        # Stacked matrices: it is not. The border is at 32.
        ((8, 4, 31), (1, 8, 124)),
        ((8, 4, 32), (8, 4, 32)),
        ((2, 3, 4, 40), (6, 4, 40)),
        ((1, 16, 40), (1, 16, 40)),
        # A matrix is one however narrow it is.
        ((100, 3), (1, 100, 3)),
    ],
)
def test_view(shape: tuple[int, ...], view: tuple[int, int, int]) -> None:
    assert matrix_view(shape) == MatrixView(*view)
    assert prod(view) == prod(shape)


@pytest.mark.parametrize("shape", [(), (1,), (4096,), (0,), (0, 5), (5, 0), (3, 0, 64)])
def test_no_view(shape: tuple[int, ...]) -> None:
    assert matrix_view(shape) is None


def test_the_kind_decides_over_the_view() -> None:
    """A ViT's patch embedding has kernels of 32 x 32; stacked biases are vectors."""
    assert matrix_view((768, 3, 32, 32)) == MatrixView(2304, 32, 32)
    assert matrix_view((768, 3, 32, 32), "convolution") == MatrixView(1, 768, 3072)
    assert matrix_view((768, 768), "convolution") == matrix_view((768, 768)) == MatrixView(1, 768, 768)
    assert matrix_view((32, 5760), "vector") is None
    plan = plan_tensor((32, 5760), kind="vector")
    assert plan.state_bytes == 16 + 2 * 4 * 32 * 5760


def test_view_takes_a_torch_size() -> None:
    assert matrix_view(torch.Size((3, 4))) == MatrixView(1, 3, 4)
    assert plan_tensor(torch.Size((64, 64)), rank=8).shape == (64, 64)


# --- Ratio and width --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rank", "ratio", "width"),
    [
        ((768, 768), 128, 6, 128),
        ((3072, 768), 128, 6, 128),  # tall: m·k = 3072·128 = rank · max(m, n)
        ((768, 3072), 128, 6, 512),  # wide: m·k = 768·512 = rank · max(m, n), the same
        ((768, 768), 100, 7, 110),  # 768 // 100 = 7, ceil(768 / 7) = 110
        ((768, 768), 384, 2, 384),
        ((96, 64), 1, 64, 1),
        ((16, 40), 3, 5, 8),
        ((8, 64, 96), 16, 4, 24),
        ((64, 3, 7, 7), 16, 4, 37),  # ceil(147 / 4)
    ],
)
def test_ratio_follows_from_rank(shape: tuple[int, ...], rank: int, ratio: int, width: int) -> None:
    plan = plan_tensor(shape, rank=rank)
    assert (plan.momentum, plan.ratio, plan.width, plan.reason) == ("sketch", ratio, width, "")


@pytest.mark.parametrize(
    ("columns", "ratio", "kept", "width"),
    [(96, 2, 2, 48), (97, 2, 2, 49), (96, 24, 24, 4), (97, 24, 24, 5), (48, 48, 48, 1), (48, 100, 48, 1)],
)
def test_ratio_itself(columns: int, ratio: int, kept: int, width: int) -> None:
    """The same for every tensor; no more than the columns there are. It needs no rank."""
    plan = plan_tensor((64, columns), rank=None, ratio=ratio)
    assert (plan.momentum, plan.ratio, plan.width) == ("sketch", kept, width)


@given(m=st.integers(1, 500), n=st.integers(1, 500), rank=st.integers(1, 300))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_sketch_is_never_larger_than_what_it_sketches(m: int, n: int, rank: int) -> None:
    """ρ = min(m, n) // r >= 2 halves the columns at least (rounded up); otherwise every column is kept."""
    plan = plan_tensor((m, n), rank=rank, kind="matrix")
    assert plan.ratio == max(1, min(m, n) // rank)
    assert plan.width == -(-n // plan.ratio)
    assert (plan.momentum == "sketch") == (plan.ratio >= 2) == (plan.reason == "")
    if plan.momentum == "sketch":
        assert plan.width <= (n + 1) // 2


# --- What is kept, and why --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "momentum", "reason"),
    [
        ((64,), {}, "whole", "vector: kept whole, in float32"),
        ((), {}, "whole", "vector: kept whole, in float32"),
        ((0, 5), {}, "whole", "empty"),
        ((64, 64), {"rank": 32}, "sketch", ""),
        ((64, 64), {"rank": 33}, "whole", "rank 33 > 64 // 2: every column kept"),
        ((128, 64), {"rank": 128}, "whole", "rank 128 > 64 // 2: every column kept"),
        ((64, 64), {"rank": None, "ratio": 1}, "whole", "ratio 1: every column kept"),
        ((64, 64), {"beta1": None}, "none", "beta1 keeps no momentum"),
        ((64, 64), {"beta1": 0.0}, "none", "beta1 keeps no momentum"),
        ((64,), {"beta1": None}, "none", "beta1 keeps no momentum"),
        ((8193, 64), {"rank": 8}, "none", "vocabulary-like, aspect 128 >= 8 and 8193 > 8192: no momentum"),
        ((64, 8193), {"rank": 8}, "none", "vocabulary-like, aspect 128 >= 8 and 8193 > 8192: no momentum"),
        ((16384, 2048), {}, "none", "vocabulary-like, aspect 8 >= 8 and 16384 > 8192: no momentum"),
        ((16384, 2049), {}, "sketch", ""),  # aspect just below 8
        ((8192, 64), {"rank": 8}, "sketch", ""),  # 8192 is not above 8192
        ((4864, 896), {}, "sketch", ""),  # the MLP of Qwen2-0.5B
        # LoRA's factors keep their momentum whole.
        ((8, 8192), {}, "whole", "rank 128 > 8 // 2: every column kept"),
        ((8192, 8), {}, "whole", "rank 128 > 8 // 2: every column kept"),
        # Three and more dimensions are never a vocabulary: convolutions, experts' biases, position tables.
        ((20000, 64, 3, 3), {"rank": 8}, "sketch", ""),
        ((9000, 1, 4), {"ratio": 2, "rank": None}, "sketch", ""),
        ((1, 9000, 64), {"rank": 8}, "sketch", ""),
        # The kind decides where it is given.
        ((768, 3, 32, 32), {"kind": "convolution"}, "sketch", ""),
        ((768, 3, 32, 32), {"kind": "matrix"}, "whole", "rank 128 > 32 // 2: every column kept"),
        ((768, 3, 32, 32), {"kind": "vector"}, "whole", "vector: kept whole, in float32"),
        ((8193, 64), {"rank": 8, "embedding_momentum": "compressed"}, "sketch", ""),
        (
            (8193, 64),
            {"rank": 8, "embedding_momentum": "full"},
            "whole",
            "vocabulary-like, aspect 128 >= 8 and 8193 > 8192: every column kept",
        ),
        ((8193, 64), {"rank": 8, "kind": "matrix"}, "sketch", ""),
        ((64, 64), {"rank": 8, "kind": "vocabulary"}, "none", "vocabulary: no momentum"),
        (
            (64, 64),
            {"rank": 8, "kind": "vocabulary", "embedding_momentum": "full"},
            "whole",
            "vocabulary: every column kept",
        ),
    ],
)
def test_what_is_kept_and_why(shape: tuple[int, ...], options: dict[str, Any], momentum: str, reason: str) -> None:
    plan = plan_tensor(shape, **options)
    assert (plan.momentum, plan.reason) == (momentum, reason)
    if momentum != "sketch":
        assert plan.ratio == 1
        assert "projection_weight" not in plan.buffers
    assert ("exp_avg" in plan.buffers) == (momentum != "none")


def test_the_second_moment_does_not_decide_over_momentum() -> None:
    """In flora-opt ``factorize_second_moment=False`` silently kept the momentum whole."""
    plan = plan_tensor((64, 64), rank=8, factorize_second_moment=False)
    assert (plan.momentum, plan.ratio) == ("sketch", 8)
    assert plan.buffers["variance"].shape == (64, 64)
    assert not {"row_var", "col_var"} & plan.buffers.keys()


# --- Bytes ------------------------------------------------------------------------------------------------


def momentum_bytes(rows: int, width: int, state_dtype: str) -> int:
    """Of ``rows`` rows of ``width`` numbers, with a float32 scale for each begun block of 64."""
    scales = rows * ((width + 63) // 64) * 4
    return {
        "float32": rows * width * 4,
        "bfloat16": rows * width * 2,
        "int8": rows * width + scales,
        "int4": rows * ((width + 1) // 2) + scales,
    }[state_dtype]


@pytest.mark.parametrize("state_dtype", STORAGE)
@pytest.mark.parametrize("projection", ["sign", "adaptive", "gaussian"])
@pytest.mark.parametrize("n", [96, 97, 127, 128, 129, 1, 2, 3])
def test_bytes_of_a_matrix(n: int, projection: policy.Projection, state_dtype: policy.StateDtype) -> None:
    """Momentum, weights where they are learnt, a row and a column, and two int64: step and number."""
    m = 30
    plan = plan_tensor((m, n), rank=None, ratio=2, projection=projection, state_dtype=state_dtype, kind="matrix")
    sketched = n >= 2
    width = (n + 1) // 2 if sketched else n
    learnt = 4 * n if projection == "adaptive" and sketched else 0
    assert plan.state_bytes == 16 + momentum_bytes(m, width, state_dtype) + learnt + 4 * (m + n)


@pytest.mark.parametrize("state_dtype", STORAGE)
def test_bytes_of_stacks_vectors_and_full_second_moments(state_dtype: str) -> None:
    options: dict[str, Any] = {"rank": None, "ratio": 3, "state_dtype": state_dtype, "kind": "matrix"}
    stack = plan_tensor((2, 3, 10, 41), projection="adaptive", **options)
    batch, rows, width = 6, 60, 14
    assert stack.state_bytes == 16 + momentum_bytes(rows, width, state_dtype) + 4 * (batch * 41 + rows + batch * 41)
    full = plan_tensor((10, 41), factorize_second_moment=False, **options)
    assert full.state_bytes == 16 + momentum_bytes(10, width, state_dtype) + 4 * 10 * 41
    assert plan_tensor((41,), **options).state_bytes == 16 + 2 * 4 * 41
    assert plan_tensor((), **options).state_bytes == 16 + 2 * 4
    assert plan_tensor((41,), beta1=None, **options).state_bytes == 16 + 4 * 41
    assert plan_tensor((0, 3), **options).state_bytes == 16


def test_bytes_of_a_layer_that_can_be_checked_on_paper() -> None:
    """A 4096 x 4096 matrix at rank 128, ρ = 32: 0.53 MB of int8 momentum and 33 kB of second moment.

    float32 AdamW keeps 134 MB for it.
    """
    plan = plan_tensor((4096, 4096), rank=128)
    assert plan.state_bytes == 16 + 4096 * 128 + 4096 * 2 * 4 + 2 * 4096 * 4 == 589840


matrices = st.tuples(st.integers(1, 40), st.integers(1, 140))
stacks = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 70))
kernels = st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
anything = st.one_of(matrices, stacks, kernels, st.tuples(st.integers(0, 200)), st.just(()))


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "projection": draw(st.sampled_from(["sign", "adaptive", "gaussian"])),
        "state_dtype": draw(st.sampled_from(STORAGE)),
        "embedding_momentum": draw(st.sampled_from(["none", "full", "compressed"])),
        "factorize_second_moment": draw(st.booleans()),
        "beta1": draw(st.sampled_from([None, 0, 0.9])),
    }
    name = draw(st.sampled_from(["rank", "ratio"]))
    return chosen | {"rank": None, name: draw(st.integers(1, 50))}


def allocated(optimizer: Flora, param: torch.Tensor) -> int:
    """Bytes of the memory behind the state, whole storages, not views into them."""
    storages = {value.untyped_storage() for value in optimizer.state[param].values()}
    return sum(storage.nbytes() for storage in storages)


@pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
@given(shape=anything, chosen=options())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_predicted_bytes_are_what_the_optimizer_allocates(shape: tuple[int, ...], chosen: dict[str, Any]) -> None:
    """Before the first step and after two; buffers by name, shape and dtype; the report says the same."""
    param = torch.nn.Parameter(torch.ones(shape))
    optimizer = Flora([param], lr=1e-3, **chosen)
    plan = plan_tensor(shape, **chosen)
    for _ in range(3):
        found = {key: (tuple(v.shape), str(v.dtype)) for key, v in optimizer.state[param].items()}
        assert found == {key: (b.shape, f"torch.{b.dtype}") for key, b in plan.buffers.items()}
        assert allocated(optimizer, param) == plan.state_bytes == optimizer.report().state_bytes
        param.grad = torch.ones(shape)
        optimizer.step()


def test_every_plan_is_hashable_and_equal_to_its_like() -> None:
    """Plans are keys: of compiled functions, and of a report's rows."""
    one, other = (plan_tensor((64, 64), rank=8) for _ in range(2))
    assert isinstance(one, TensorPlan)
    assert hash(one) == hash(other)
    assert one == other != plan_tensor((64, 64), rank=9)


# --- Layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["policy", "reference"])
def test_policy_and_reference_import_numpy_and_the_standard_library_only(name: str) -> None:
    source = Path(policy.__file__).with_name(f"{name}.py")
    imported = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0] if node.level == 0 else "floragrad")
    assert imported <= set(sys.stdlib_module_names) | {"numpy"}


@pytest.mark.parametrize(("ours", "others"), list(product(["torch"], ["jax", "train", "cli"])))
def test_the_torch_half_imports_neither_jax_nor_the_training_command(ours: str, others: str) -> None:
    folder = Path(policy.__file__).parent / ours
    for source in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert not module.startswith(f"floragrad.{others}"), f"{source.name} imports {module}"
                assert module.partition(".")[0] != others, f"{source.name} imports {module}"


@pytest.mark.parametrize(
    ("shape", "options", "ratio", "reason"),
    [
        ((64, 96), {"rank": 16}, 4, ""),
        ((96, 64), {"rank": 16}, 4, ""),
        ((64, 96), {"rank": 48}, 1, ""),
        ((64, 96), {"ratio": 3}, 3, ""),
        ((64, 96), {"ratio": 1000}, 96, ""),
        ((8256, 64), {"ratio": 3}, 1, "vocabulary-like, aspect 129 >= 8 and 8256 > 8192: every column kept"),
        ((8256, 64), {"rank": 16, "kind": "matrix"}, 4, ""),
        ((640, 64), {"ratio": 3}, 3, ""),
        ((8256, 4, 4), {"ratio": 3}, 3, ""),
        ((64, 3, 32, 32), {"ratio": 3, "kind": "convolution"}, 3, ""),
        ((64, 96), {"ratio": 3, "kind": "vector"}, 1, "vector: summed exactly"),
        ((64, 96), {"ratio": 3, "kind": "vocabulary"}, 1, "vocabulary-like: every column kept"),
        ((64,), {"ratio": 3}, 1, "vector: summed exactly"),
    ],
)
def test_accumulators_go_by_ratio_or_rank(
    shape: tuple[int, ...], options: dict[str, Any], ratio: int, reason: str
) -> None:
    plan = plan_accumulator(shape, **options)
    assert (plan.ratio, plan.reason) == (ratio, reason)
    assert plan.width == -(-plan.view.columns // ratio)
