"""The conventions of torch.optim: those that the wheel ships as data, and its habits in our own words."""

import copy
import io
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    get_error_inputs_for_all_optims,
)

from floragrad import Flora

pytestmark = pytest.mark.filterwarnings("ignore:Flora compresses no momentum")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"state_dtype": "int4"},
    {"state_dtype": "float32"},
    {"state_dtype": torch.bfloat16},
    {"projection": "adaptive", "kappa": 3},
    {"projection": "gaussian", "kappa": 3},
    {"residual": False, "kappa": 3},
    {"beta1": None},
    {"factorize_second_moment": False},
]


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 24))
    return layers.to(dtype)


def flora(net: torch.nn.Module, **options: Any) -> Flora:
    return Flora(net.parameters(), **{"lr": 1e-2, "ratio": 4} | options)


def loss_of(net: torch.nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(net.parameters()).dtype
    inputs = torch.randn(16, 24, generator=generator).to(dtype)
    return (net(inputs) - inputs.flip(1)).square().mean()


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    for seed in steps:
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "convention",
    get_error_inputs_for_all_optims("cpu", torch.float32),
    ids=lambda c: c.optimizer_error_input.desc,
)
def test_errors_that_torch_expects_of_every_optimizer(convention: Any) -> None:
    given = convention.optimizer_error_input
    params = given.params if given.params is not None else [torch.nn.Parameter(torch.ones(4, 4))]
    assert convention.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    if convention.error_type is UserWarning:
        with pytest.warns(UserWarning, match=convention.error_regex):
            Flora(params, **{"lr": 1e-3} | given.kwargs)
    else:
        with pytest.raises(convention.error_type, match=convention.error_regex):
            Flora(params, **{"lr": 1e-3} | given.kwargs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pickle_and_deepcopy_go_on_alike(options: dict[str, Any]) -> None:
    net = model()
    optimizer = flora(net, **options)
    train(net, optimizer, range(4))
    copies = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
    expected = train(net, optimizer, range(4, 9))
    for copied in copies:
        assert_equal(train(*copied, range(4, 9)), expected)
        assert copied[1].report() == optimizer.report()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_seed_same_numbers_other_seed_others(options: dict[str, Any]) -> None:
    def run(seed: int) -> list[torch.Tensor]:
        net = model()
        torch.manual_seed(seed + 100)  # the global generator is not used
        return train(net, flora(net, **options, seed=seed), range(5))

    assert_equal(run(1), run(1))
    drawn = options.get("beta1", 0.9) is not None
    assert drawn != all(torch.equal(a, b) for a, b in zip(run(1), run(2), strict=True))


def test_global_generator_is_left_alone() -> None:
    net = model(torch.bfloat16)
    optimizer = flora(net, projection="gaussian")
    loss_of(net, 0).backward()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    optimizer.step()
    assert torch.equal(torch.rand(3), expected)


def test_a_tensor_lr_equals_a_number() -> None:
    trained = []
    for lr in (1e-2, torch.tensor(1e-2), torch.tensor([1e-2], dtype=torch.float64)):
        net = model()
        trained.append(train(net, flora(net, lr=lr, weight_decay=0.1), range(5)))
        assert not isinstance(lr, torch.Tensor) or lr.item() == pytest.approx(1e-2)
    assert_equal(trained[0], trained[1])
    assert_equal(trained[0], trained[2])


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=4),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=2e-2, total_steps=8, cycle_momentum=False),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    ],
    ids=["step", "cosine", "linear", "one-cycle", "lambda"],
)
def test_schedulers_drive_the_step(scheduler: Any, tensor_lr: bool) -> None:
    """Under a scheduler each step equals that of an optimizer told the scheduled rate by hand."""
    net, by_hand = model(), model()
    optimizer = flora(net, lr=torch.tensor(1e-2) if tensor_lr else 1e-2)
    other = flora(by_hand)
    schedule = scheduler(optimizer)
    rates = set()
    for seed in range(6):
        rates.add(float(optimizer.param_groups[0]["lr"]))
        other.param_groups[0]["lr"] = float(optimizer.param_groups[0]["lr"])
        assert_equal(train(net, optimizer, range(seed, seed + 1)), train(by_hand, other, range(seed, seed + 1)))
        schedule.step()
    assert len(rates) >= 3


def test_reduce_on_plateau() -> None:
    optimizer = flora(model())
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(3):
        schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-3)


def test_options_per_group_equal_an_optimizer_per_group() -> None:
    together, apart = model(), model()
    # Random numbers are keyed by a parameter's position: the second group draws none, to compare it alone.
    first = {"lr": 1e-2, "ratio": 2, "projection": "adaptive", "kappa": 3, "weight_decay": 0.1}
    second = {"lr": 3e-3, "ratio": 1, "beta1": 0.8, "state_dtype": "float32", "clip_threshold": 0.5}
    both = Flora(
        [{"params": together[0].parameters(), **first}, {"params": together[2].parameters(), **second}],
        lr=1.0,
    )
    alone = [Flora(apart[0].parameters(), **first), Flora(apart[2].parameters(), **second)]
    for seed in range(5):
        both.zero_grad()
        loss_of(together, seed).backward()
        both.step()
        for optimizer in alone:
            optimizer.zero_grad()
        loss_of(apart, seed).backward()
        for optimizer in alone:
            optimizer.step()
    assert_equal(list(together.parameters()), list(apart.parameters()))


def test_add_param_group_later() -> None:
    net, late = model(), torch.nn.Parameter(torch.zeros(32, 48))
    optimizer = flora(net)
    train(net, optimizer, range(2))
    optimizer.add_param_group({"params": [late], "ratio": 8, "lr": 1.0})
    assert optimizer.state[late]["exp_avg"].shape == (32, 6)
    late.grad = torch.ones(32, 48)
    optimizer.step()
    assert late.abs().min() > 0
    assert optimizer.report().rows[-1].ratio == 8
    restored = flora(net)
    restored.add_param_group({"params": [late], "ratio": 8, "lr": 1.0})
    restored.load_state_dict(optimizer.state_dict())
    assert_equal(list(restored.state[late].values()), list(optimizer.state[late].values()))


def test_a_refused_group_changes_nothing() -> None:
    net = model()
    optimizer = flora(net)
    before = optimizer.report()
    with pytest.raises(ValueError, match="ratio=0"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(8, 8))], "ratio": 0})
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.cfloat))]})
    assert len(optimizer.param_groups) == 1
    assert optimizer.report() == before


def test_closure() -> None:
    net, again = model(), model()
    optimizer, plain = flora(net), flora(again)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    expected = loss_of(net, 0).item()
    assert optimizer.step(closure).item() == expected
    assert_equal(list(net.parameters()), train(again, plain, range(1)))


def test_frozen_parameters_keep_no_state_until_they_thaw() -> None:
    net = model()
    net[0].weight.requires_grad_(False)
    optimizer = flora(net)
    frozen = net[0].weight.clone()
    train(net, optimizer, range(3))
    assert torch.equal(net[0].weight, frozen)
    assert net[0].weight not in optimizer.state
    net[0].weight.requires_grad_(True)
    train(net, optimizer, range(3, 5))
    assert optimizer.state[net[0].weight]["step"] == 2
    assert not torch.equal(net[0].weight, frozen)


def test_steps_count_only_gradients_seen() -> None:
    """A parameter whose gradient is None on some steps goes on as if those steps had not been."""
    net, other = model(), model()
    optimizer, always = flora(net, kappa=2), flora(other, kappa=2)
    for seed in range(6):
        optimizer.zero_grad()
        if seed % 2:
            optimizer.step()  # every gradient is None
        loss_of(net, seed).backward()
        optimizer.step()
    assert_equal(list(net.parameters()), train(other, always, range(6)))


def test_tied_weights_are_updated_once() -> None:
    weight, other = (torch.nn.Parameter(torch.ones(32, 32)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        tied = Flora([weight, weight], lr=1e-2, ratio=4)
    once = Flora([other], lr=1e-2, ratio=4)
    weight.grad = other.grad = torch.randn(32, 32)
    tied.step()
    once.step()
    assert torch.equal(weight, other)
    assert len(tied.report().rows) == 1


def test_hooks_run() -> None:
    net = model()
    optimizer = flora(net)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": "mine"})
    train(net, optimizer, range(1))
    assert seen == ["before", "after"]
    assert optimizer.state_dict()["note"] == "mine"


def test_load_hooks_see_and_change_the_state() -> None:
    net = model()
    optimizer = flora(net)
    train(net, optimizer, range(2))
    saved = optimizer.state_dict()
    fresh = flora(model())

    def forget(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "state": {0: {**state["state"][0], "step": torch.tensor(7.0)}}}

    seen: list[float] = []
    fresh.register_load_state_dict_pre_hook(forget)
    fresh.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[o.param_groups[0]["params"][0]]["step"].item())
    )
    fresh.load_state_dict(saved)
    assert seen == [7.0]


def test_grad_scaler_skips_infinite_gradients_and_backs_off() -> None:
    net, plain = model(), model()
    optimizer, other = flora(net), flora(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    scaler.scale(loss_of(net, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    train(plain, other, range(1))
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    (scaler.scale(loss_of(net, 1)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_equal(list(net.parameters()), before)
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_not_finite_propagates(options: dict[str, Any], value: float) -> None:
    """As in torch.optim: into the element, and into the state, which stays not finite."""
    param = torch.nn.Parameter(torch.ones(24, 40))
    optimizer = Flora([param], **{"lr": 1e-2, "ratio": 4} | options)
    param.grad = torch.randn(24, 40)
    param.grad[3, 5] = value
    optimizer.step()
    assert param[3, 5].isnan()
    param.grad = torch.randn(24, 40)
    optimizer.step()
    assert param[3, 5].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_keep_theirs(dtype: torch.dtype) -> None:
    net = model(dtype)
    optimizer = flora(net)
    start = loss_of(net, 0).item()
    train(net, optimizer, range(60))
    assert loss_of(net, 0).item() < 0.9 * start
    assert all(p.dtype == dtype for p in net.parameters())
    state = optimizer.state[net[0].weight]
    assert {key: value.dtype for key, value in state.items()} == {
        "step": torch.int64,
        "tensor_id": torch.int64,
        "exp_avg": torch.int8,
        "exp_avg_scale": torch.float32,
        "row_var": torch.float32,
        "col_var": torch.float32,
    }


def test_bfloat16_parameters_move_by_less_than_their_spacing() -> None:
    """Steps of a hundredth of the spacing are lost to nearest rounding; stochastic rounding keeps their mean.

    512 x 512 parameters at 1.0, 32 steps of 2**-8 / 100 each: with rounding that is unbiased the mean moves by
    32 · 2**-8 / 100, and its error has a standard deviation of at most √32 · 2**-8 / 2 / 512 = 2.2e-5,
    of which we allow six.
    """
    moved = {}
    for stochastic in (True, False):
        param = torch.nn.Parameter(torch.ones(512, 512, dtype=torch.bfloat16))
        optimizer = Flora([param], lr=2**-8 / 100, rank=64, beta1=None, stochastic_rounding=stochastic)
        for _ in range(32):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[stochastic] = 1 - param.float().mean().item()
    assert moved[False] == 0
    assert abs(moved[True] - 32 * 2**-8 / 100) < 6 * 2.2e-5


@pytest.mark.usefixtures("eager")
def test_foreign_layouts_equal_contiguous_ones() -> None:
    """Transposed and channels-last parameters, expanded and strided gradients: in every bit."""
    for make in (
        lambda: torch.randn(40, 24).t(),
        lambda: torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last),
        lambda: torch.randn(6, 24, 80)[..., ::2],
    ):
        torch.manual_seed(0)
        odd = torch.nn.Parameter(make())
        plain = torch.nn.Parameter(odd.detach().clone(memory_format=torch.contiguous_format))
        assert not odd.is_contiguous()
        optimizers = [Flora([p], lr=1e-2, ratio=4, weight_decay=0.1) for p in (odd, plain)]
        for _ in range(3):
            odd.grad = torch.randn(odd.shape)
            plain.grad = odd.grad.clone()
            odd.grad = odd.grad.to(memory_format=torch.channels_last) if odd.dim() == 4 else odd.grad
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(odd, plain)


def test_sparse_gradients_are_refused_by_name_before_anything_moves() -> None:
    embedding = torch.nn.Embedding(100, 32, sparse=True)
    dense = torch.nn.Linear(32, 32)
    named = [*dense.named_parameters("dense"), *embedding.named_parameters("embedding")]
    optimizer = Flora(named, lr=1e-2, ratio=4)
    dense(embedding(torch.tensor([1, 2]))).sum().backward()
    before = dense.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"embedding\.weight is sparse.*sparse=False"):
        optimizer.step()
    assert torch.equal(dense.weight, before)


def test_complex_parameters_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"phase is complex \(torch\.complex64\)"):
        Flora([("phase", torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.cfloat)))], lr=1e-3)


def test_empty_parameters_are_passed_over() -> None:
    empty, full = torch.nn.Parameter(torch.zeros(0, 8)), torch.nn.Parameter(torch.ones(8, 8))
    optimizer = Flora([empty, full], lr=1e-2, ratio=2)
    empty.grad, full.grad = torch.zeros(0, 8), torch.ones(8, 8)
    optimizer.step()
    assert (full < 1).all()


def test_a_model_that_leaves_the_meta_device_after_the_optimizer_was_made() -> None:
    """Its state is made where the parameters are by then, and equals that of one made there at once."""
    trained = []
    for late in (True, False):
        with torch.device("meta" if late else "cpu"):
            net = torch.nn.Linear(24, 40)
        params = list(net.parameters())
        optimizer = Flora(params, lr=1e-2, ratio=4, projection="adaptive")
        for param in params:
            if late:  # as to_empty does under set_swap_module_params_on_conversion
                torch.utils.swap_tensors(param, torch.nn.Parameter(torch.empty(param.shape)))
            param.data.fill_(1)
            param.grad = torch.arange(param.numel(), dtype=torch.float32).reshape(param.shape) - 3
        optimizer.step()
        trained.append([p.detach().clone() for p in params])
    assert_equal(*trained)


def test_step_parameter_in_any_order_equals_step() -> None:
    net, layerwise = model(torch.bfloat16), model(torch.bfloat16)
    optimizer, other = flora(net), flora(layerwise)
    train(net, optimizer, range(3))
    for seed in range(3):
        other.zero_grad()
        loss_of(layerwise, seed).backward()
        for param in reversed(list(layerwise.parameters())):
            other.step_parameter(param)
    assert_equal(list(net.parameters()), list(layerwise.parameters()))
    other.zero_grad()
    with pytest.raises(ValueError, match="parameter 0 has no gradient"):
        other.step_parameter(layerwise[0].weight)


def test_no_warning_where_momentum_is_compressed_or_not_wanted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flora(model())
        flora(model(), beta1=None)
        flora(model(), ratio=1)


def test_warns_once_where_nothing_is_compressed() -> None:
    with pytest.warns(UserWarning, match=r"parameter 0 \(rank 128 > 24 // 2: every column kept\)") as caught:
        Flora(model().parameters(), lr=1e-3)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def linears(*shapes: tuple[int, int]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        # 40 x 40 and two of 16 x 40 at rank 12: 1,600 numbers are sketched, 1,280 are not.
        (linears((40, 40), (16, 40), (16, 40)), None),
        (
            linears((40, 40), (16, 40), (16, 64)),
            r"compresses 49% of the momentum of hidden tensors here: "
            r"parameter 2 \(rank 12 > 16 // 2: every column kept\)"
            r", parameter 1 \(rank 12 > 16 // 2: every column kept\); a smaller rank",
        ),
        (
            [{"params": linears((40, 40))}, {"params": linears((64, 640)), "kind": "vocabulary"}],
            None,
        ),
        (
            linears((40, 40), (8200, 8)),
            r"2% of .* parameter 1 \(vocabulary-like, .*no momentum\); param_groups\(model\) tells embeddings",
        ),
        ([{"params": linears((40, 40))}, {"params": linears((16, 640)), "ratio": 1}], None),
        ([{"params": linears((40, 40))}, {"params": linears((16, 640)), "beta1": None}], None),
        ([linears((40, 40))[0], *(param.requires_grad_(False) for param in linears((16, 640)))], None),
    ],
)
def test_warns_where_less_than_half_of_hidden_momentum_is_compressed(params: list[Any], message: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Flora(params, lr=1e-3, rank=12)
    found = [str(each.message) for each in caught]
    assert len(found) == (message is not None), found
    assert message is None or re.search(message, found[0]), found


def test_a_misspelt_option_of_a_group_is_refused() -> None:
    """Entries that are no option, as schedulers keep, are taken."""
    [param] = linears((40, 40))
    for name, meant in (("rnk", "rank"), ("betas", "beta1"), ("weight_dcay", "weight_decay")):
        with pytest.raises(
            ValueError, match=rf"a group has {name}=3, which is no option of Flora \(did you mean {meant}"
        ):
            Flora([{"params": [param], name: 3}], lr=1e-3)
    optimizer = Flora([{"params": [param], "initial_lr": 1.0, "max_lr": 2.0, "name": "a", "layer": 3}], lr=1e-3, rank=8)
    assert optimizer.param_groups[0]["layer"] == 3


def test_state_dict_is_a_plain_file_of_tensors() -> None:
    net = model()
    optimizer = flora(net, projection="adaptive")
    train(net, optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["state"][0].keys() == optimizer.state[net[0].weight].keys()
