"""The Triton kernels in the interpreter: the oracle's numbers, the eager code's bits, few launches, few bytes.

That they compile for GPUs, and what they take there, is in ``test_triton_compiled.py``.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from floragrad import Flora
from floragrad.torch import backends
from floragrad.torch.backends.triton import step as step_module
from floragrad.torch.backends.triton.step import check_not_capturing, passes
from floragrad.torch.context import ParamUpdate, StepContext
from floragrad.torch.options import plan_for, resolve_group
from floragrad.torch.param_info import initial_state
from floragrad.torch.part import Part, Passes
from tests.marks import slow
from tests.torch.cases import CASES, Case, cases
from tests.torch.conftest import use
from tests.torch.interpreter import accesses, launched, use_triton
from tests.torch.oracle import assert_same_course, reference_trajectory, trajectory

pytestmark = pytest.mark.filterwarnings("ignore:Flora compresses no momentum")

STATE_DTYPES = ["float32", "bfloat16", "int8", "int4"]
# Two resamplings, at 2 and 4: a program takes milliseconds in the interpreter.
KAPPA, STEPS = 2, 5

SHAPES = [
    Case("blocks", (10, 390), {"ratio": 3}),
    Case("odd-width", (9, 213), {"ratio": 3}),
    Case("experts", (2, 5, 200), {"ratio": 4}),
    Case("whole", (6, 150), {"ratio": 1}),
    Case("paper", (10, 390), {"ratio": 3, "residual": False}),
    Case("adaptive", (10, 390), {"ratio": 3, "projection": "adaptive"}),
    Case("full-second-moment", (6, 150), {"ratio": 2, "factorize_second_moment": False}),
]
VECTOR = Case("vector", (300,))


def drawn(rows: list[Any]) -> list[Any]:
    """All but Gaussian projections, which the eager code multiplies by."""
    return [row for row in rows if "gaussian" not in str(row)]


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch)


def train(case: Case, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Tensor, Flora]:
    param = case.parameter(dtype)
    options = {"kappa": KAPPA, "embedding_momentum": "compressed", "weight_decay": 0.1} | changes
    optimizer = Flora([param], **case.all_options(**options))
    for grad in case.gradients(STEPS, dtype):
        param.grad = grad.clone()
        optimizer.step()
    return param.detach(), optimizer


def both(case: Case, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[tuple[Tensor, Flora]]:
    """What the Triton kernels and the eager code make of it."""
    made = []
    for prepare in (use_triton, lambda patch: use("eager", patch)):
        with monkeypatch.context() as patch:
            prepare(patch)
            made.append(train(case, **changes))
    return made


# --- Numbers --------------------------------------------------------------------------------------------------


# One row of each kind: others have other numbers, which are arguments of the same kernels, and the interpreter takes a
# hundred times as long for the vocabularies' 8,200 rows.
QUICK = {
    *("wide", "k-does-not-divide-n", "one-bucket", "ratio-1", "convolution", "stacked-experts", "vector", "scalar"),
    *("paper-estimator", "adaptive-experts", "no-momentum", "full-second-moment", "scale-parameter", "relative-step"),
}


@pytest.mark.parametrize("case", drawn(cases(quick=QUICK)), ids=str)
def test_every_case_equals_the_oracle(case: Case, triton: None) -> None:
    shorter = replace(case, options={"kappa": KAPPA} | case.options)
    gradients = shorter.gradients(STEPS)
    assert_same_course(shorter, trajectory(shorter, gradients), reference_trajectory(shorter, gradients))


@pytest.mark.parametrize(
    ("case", "state_dtype"),
    [
        (pytest.param if case.name in ("odd-width", "adaptive") else slow)(case, dtype)
        for case in SHAPES
        for dtype in STATE_DTYPES[1:]
        if case in SHAPES[:2] or dtype == "int4"
    ],
    ids=str,
)
def test_low_bit_state_is_that_of_eager(case: Case, state_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Payloads are the same bytes, but for what a unit in the last place of a sum tips over.

    A float32 number in units of its grid, at most 128 of them, differs by a few 2**-24 of itself, so tips over with a
    probability of about 4 · 128 · 2**-24 = 3e-5 in a step, and one that has stays off for the 5 steps: 1.5e-4 of all
    numbers, at most 1,300. More than 5 of them have a probability below 1e-7.
    """
    (_, ours), (_, eager) = both(case, monkeypatch, state_dtype=state_dtype)
    (found,), (expected,) = ours.state.values(), eager.state.values()
    assert found["exp_avg"].dtype == expected["exp_avg"].dtype
    assert (found["exp_avg"] != expected["exp_avg"]).sum() <= 5
    if "exp_avg_scale" in found:
        torch.testing.assert_close(found["exp_avg_scale"], expected["exp_avg_scale"], rtol=1e-5, atol=0)


def half_precisions() -> list[Any]:
    """Shapes × dtypes × roundings: of each shape one, which are all pairs of a dtype and a rounding."""
    kinds = [(torch.bfloat16, True), (torch.float16, False), (torch.float16, True), (torch.bfloat16, False)]
    shapes = [SHAPES[0], SHAPES[2], SHAPES[3], VECTOR]
    return [
        (pytest.param if at == number else slow)(case, *kind)
        for at, case in enumerate(shapes)
        for number, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(("case", "dtype", "stochastic"), half_precisions(), ids=str)
def test_half_precision_parameters_are_those_of_eager(
    case: Case, dtype: torch.dtype, stochastic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, but for what a unit in the last place of float32 tips over when it is rounded.

    One in 2**24 of a number is 2**-13 of the distance between two float16, 2**-16 of that between two bfloat16: with a
    fifth of the numbers one unit apart, 5 steps of 3,900 of them tip over 0.5 of them, and more than 5 with a
    probability below 1e-4. Other random bits would change half of them.
    """
    (ours, _), (eager, _) = both(case, monkeypatch, dtype=dtype, stochastic_rounding=stochastic)
    assert ours.dtype == dtype
    assert (ours != eager).sum() <= 5
    torch.testing.assert_close(ours, eager, rtol=2.0**-6, atol=1e-3)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_may_be_of_another_dtype(grad_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = SHAPES[1], []
    for prepare in (use_triton, lambda patch: use("eager", patch)):
        with monkeypatch.context() as patch:
            prepare(patch)
            param = case.parameter(torch.float16)
            param.grad_dtype = grad_dtype
            optimizer = Flora([param], **case.all_options())
            param.grad = case.gradients(1, grad_dtype)[0]
            optimizer.step()
            made.append(param.detach())
    assert torch.equal(*made)


def test_a_learning_rate_is_read_on_its_device(triton: None) -> None:
    by_tensor, _ = train(SHAPES[1], lr=torch.tensor(1e-2))
    by_number, _ = train(SHAPES[1], lr=1e-2)
    assert torch.equal(by_tensor, by_number)


def test_maximize_goes_the_other_way(triton: None) -> None:
    case = SHAPES[1]
    up, down = (case.parameter() for _ in range(2))
    optimizers = [Flora([up], maximize=True, **case.all_options()), Flora([down], **case.all_options())]
    for grad in case.gradients(STEPS):
        up.grad, down.grad = grad.clone(), -grad
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(up, down)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_arrives(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the eager code: NaN reaches parameter and state, infinities the averages, which stay finite."""
    case, made = SHAPES[1], []
    for prepare in (use_triton, lambda patch: use("eager", patch)):
        with monkeypatch.context() as patch:
            prepare(patch)
            param = case.parameter()
            optimizer = Flora([param], **case.all_options(state_dtype="int8"))
            for grad in case.gradients(2):
                grad[3, 7] = value
                param.grad = grad
                optimizer.step()
            (state,) = optimizer.state.values()
            finite = [state[key].isfinite() for key in ("exp_avg_scale", "row_var")]
            made.append((param.detach().isfinite(), *finite))
    for ours, eager in zip(*made, strict=True):
        assert torch.equal(ours, eager)


# --- Batches and shards -------------------------------------------------------------------------------------


def test_a_batch_equals_its_tensors_one_by_one(triton: None) -> None:
    """Tensors of two shapes, more than one of each, stepped together and by themselves."""
    shapes = [(4, 213), (4, 213), (40,), (4, 213), (40,)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    together, alone = ([torch.nn.Parameter(each.clone()) for each in start] for _ in range(2))
    optimizers = [Flora(params, lr=1e-2, ratio=3, state_dtype="int4") for params in (together, alone)]
    for params in (together, alone):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
    for _ in range(2):
        optimizers[0].step()
        for param in reversed(alone):
            optimizers[1].step_parameter(param)
    for ours, single in zip(together, alone, strict=True):
        assert torch.equal(ours, single)


SHARDED: list[tuple[dict[str, Any], str]] = [
    ({}, "batch"),
    ({"projection": "adaptive"}, "rows"),
    ({"residual": False}, "batch"),
    ({"factorize_second_moment": False}, "rows"),
    ({"scale_parameter": True}, "rows"),
    ({"ratio": 1}, "batch"),
]
"""Kinds of steps, and how a stack is cut in them; in the other way with ``make test-slow``."""
OTHERWISE = [slow(options, "batch" if axis == "rows" else "rows") for options, axis in SHARDED]


@pytest.mark.parametrize(("options", "axis"), [*SHARDED, *OTHERWISE], ids=str)
def test_shards_equal_the_whole_tensor(options: dict[str, Any], axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two uneven shards of a stack of matrices, with their sums added up between the passes."""
    use_triton(monkeypatch)
    case = Case("stack", (3, 6, 70), {"ratio": 3, "weight_decay": 0.1} | options)
    group = resolve_group(
        case.all_options(state_dtype="int8", kappa=2), dict(Flora([case.parameter()], lr=1.0).defaults)
    )
    plan = plan_for(torch.Size(case.shape), group)
    device = torch.device("cpu")
    cuts = {"rows": [(slice(0, 3), slice(0, 2)), (slice(0, 3), slice(2, 6))]}.get(
        axis, [(slice(0, 2), slice(0, 6)), (slice(2, 3), slice(0, 6))]
    )
    whole = case.parameter(torch.bfloat16).detach()
    state = initial_state(plan, group, 5, device)
    shards = [whole[cut].clone() for cut in cuts]
    states = [
        {
            key: (value if key in ("step", "tensor_id") else value[cut[: value.dim() - 1]]).clone()
            if key not in ("col_var", "projection_weight")
            else value[cut[:1]].clone()
            for key, value in state.items()
        }
        for cut in cuts
    ]
    for step, grad in enumerate(case.gradients(3, torch.bfloat16), 1):
        ctx = StepContext(plan, group, 5, step, device, Part.whole(plan.shape, plan.view))
        run(list(passes([ParamUpdate(whole, grad, state, ctx)])), axis)
        taken = []
        for shard, own, cut in zip(shards, states, cuts, strict=True):
            view = plan.view._replace(batch=shard.shape[0], rows=shard.shape[1])
            part = Part(view, ctx.part.shape, cut, ctx.part.columns, {axis: (0,)})
            taken += passes([ParamUpdate(shard, grad[cut].contiguous(), own, replace(ctx, part=part))])
        run(taken, axis)
    parts = torch.cat(shards, dim=1 if axis == "rows" else 0)
    assert (parts != whole).sum() <= 5  # of 1,260 numbers: see the rounding of half-precision parameters
    payload = torch.cat([own["exp_avg"] for own in states], dim=1 if axis == "rows" else 0)
    assert (payload != state["exp_avg"]).sum() <= 5


def run(passes: list[Passes], axis: str) -> None:
    """Run the passes over shards side by side, with their shares of sums along an axis added up."""
    for shares in zip(*passes, strict=True):
        for same in zip(*shares, strict=True):
            if axis in same[0].axes:
                total = torch.stack([share.value for share in same]).sum(0)
                for share in same:
                    share.value.copy_(total)


# --- Launches and bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", drawn(CASES)[:-1], ids=str)
def test_a_tensor_takes_four_launches(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one tensor and for twelve; learning an adaptive projection takes five more, every κ steps."""
    if case.name.startswith("vocabulary"):
        case = replace(case, shape=(82, 8), options=case.options | {"kind": "vocabulary"})
    use_triton(monkeypatch)
    kind = {"kind": case.options.get("kind")} if "kind" in case.options else {}
    options = {key: value for key, value in case.all_options().items() if key != "kind"}
    params = [case.parameter(torch.bfloat16, seed) for seed in range(3)]
    optimizer = Flora([{"params": params, **kind}], **options)
    for step in (1, 2):
        for param in params:
            param.grad = case.gradients(1, torch.bfloat16)[0]
        with launched(monkeypatch, run=False) as made:
            optimizer.step()
        learns = case.options.get("projection") == "adaptive" and step == 1
        assert len(made) <= (9 if learns else 4), [launch.kernel.__name__ for launch in made]


@pytest.mark.parametrize("case", [*SHAPES, VECTOR], ids=str)
def test_nothing_is_read_more_often_than_it_must(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bytes: the gradient three times, the parameter once, the momentum by the two passes that need it.

    Accesses to memory of neither parameter, gradient, state nor the launch's own fail.
    """
    use_triton(monkeypatch)
    param = case.parameter(torch.bfloat16)
    optimizer = Flora([param], **case.all_options(state_dtype="int8"))
    state, grad = optimizer.state[param], case.gradients(2, torch.bfloat16)
    param.grad = grad[0]
    optimizer.step()
    param.grad = grad[1]
    tensors = {key: value for key, value in state.items() if key not in ("step", "tensor_id")}
    with accesses({"param": param.detach(), "grad": grad[1], **tensors}, monkeypatch) as seen:
        optimizer.step()
    assert seen.read["grad"] == 3 * grad[1].nbytes
    assert seen.written["grad"] == 0
    assert seen.read["param"] == seen.written["param"] == param.nbytes
    assert seen.read["exp_avg"] == 2 * state["exp_avg"].nbytes
    assert seen.written["exp_avg"] == state["exp_avg"].nbytes
    if "variance" in state:
        assert (seen.read["variance"], seen.written["variance"]) == (
            3 * state["variance"].nbytes,
            state["variance"].nbytes,
        )


def test_another_step_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types and constants of all launches are two sets: those of steps that resample, and of the others."""
    from tests.torch.compiled import signature_of

    use_triton(monkeypatch)
    param = SHAPES[0].parameter()
    optimizer = Flora([param], **SHAPES[0].all_options(kappa=3))
    kinds: Counter[Any] = Counter()
    for step, grad in enumerate(SHAPES[0].gradients(7), 1):
        optimizer.param_groups[0]["lr"] = 1 / step
        param.grad = grad
        with launched(monkeypatch, run=False) as made:
            optimizer.step()
        kinds[str([(launch.kernel.__name__, signature_of(launch)) for launch in made])] += 1
    assert sorted(kinds.values()) == [2, 5]


def test_a_captured_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_not_capturing(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="counted on the host"):
        check_not_capturing(torch.device("cuda"))


# --- What they take -----------------------------------------------------------------------------------------


@pytest.fixture
def beside_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backends of a GPU, for the CPU."""
    monkeypatch.setattr(step_module, "DEVICES", {"cpu"})
    monkeypatch.setattr(backends, "BACKENDS", (step_module, backends.eager))
    step_module.absence.cache_clear()
    yield
    step_module.absence.cache_clear()


def test_the_report_says_why_a_tensor_is_left_to_eager_code(beside_eager: None) -> None:
    makes: dict[str, Callable[[], Tensor]] = {
        "triton": lambda: torch.zeros(64, 64).half(),
        "eager (float64)": lambda: torch.zeros(64, 64).double(),
        "eager (not contiguous)": lambda: torch.zeros(64, 32).t(),
    }
    params = [torch.nn.Parameter(make()) for make in makes.values()]
    assert [row.path for row in Flora(params, lr=1e-3, rank=8).report().rows] == list(makes)
    wide, (gaussian, *_) = torch.nn.Parameter(torch.zeros(4, 1100).half()), params
    assert Flora([wide], lr=1e-3, ratio=550).report().rows[0].path == "eager (ratio above 512)"
    (row,) = Flora([gaussian], lr=1e-3, rank=8, projection="gaussian").report().rows
    assert row.path == "eager (Gaussian projection)"


def test_the_switch_turns_them_off(beside_eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORAGRAD_KERNELS", "eager")
    row = Flora([torch.nn.Parameter(torch.zeros(64, 64).half())], lr=1e-3, rank=8).report().rows[0]
    assert row.path == "eager (FLORAGRAD_KERNELS=eager)"
