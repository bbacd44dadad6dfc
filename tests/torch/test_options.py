"""Wrong values and contradictions: one message that names the option, the value and what is allowed."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from floragrad import Flora
from floragrad.torch import options


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(32, 32))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, r"lr=-1.0: must be a number >= 0"),
    ({"lr": float("nan")}, r"lr=nan: must be a number >= 0"),
    ({"lr": "fast"}, r"lr='fast': must be a number >= 0"),
    ({"lr": torch.ones(2)}, r"lr=tensor\(.*\): must be .*1-element"),
    ({"lr": None}, r"lr=None: give a learning rate.*relative_step=True"),
    ({"lr": 1e-3, "relative_step": True}, r"lr=0.001 and relative_step=True: .*lr=None"),
    ({"warmup_init": True}, r"warmup_init=True without relative_step=True"),
    ({"rank": 0}, r"rank=0: must be an integer >= 1"),
    ({"rank": 2.5}, r"rank=2.5: must be an integer >= 1"),
    ({"rank": True}, r"rank=True: must be an integer >= 1"),
    ({"rank": None}, r"rank=None and ratio=None: give one of them"),
    ({"ratio": 0}, r"ratio=0: must be an integer >= 1"),
    ({"rank": 128, "ratio": 4}, r"rank=128 and ratio=4: give one of them"),
    ({"kappa": 0}, r"kappa=0: must be an integer >= 1"),
    ({"eps": 1e-30}, r"eps=1e-30: must be two numbers"),
    ({"eps": (1e-30, -1.0)}, r"eps=\(1e-30, -1.0\): must be two numbers"),
    ({"clip_threshold": 0}, r"clip_threshold=0: must be a number > 0"),
    ({"decay_rate": 0.8}, r"decay_rate=0.8: must be a number <= 0"),
    ({"beta1": 1.0}, r"beta1=1.0: must be a number in \[0, 1\), or None"),
    ({"beta1": -0.1}, r"beta1=-0.1: must be"),
    ({"weight_decay": -0.1}, r"weight_decay=-0.1: must be a number >= 0"),
    ({"scale_parameter": 1}, r"scale_parameter=1: must be one of True, False"),
    ({"second_moment_dtype": "int4", "factorize_second_moment": False}, r"second_moment_dtype='int4': must be one of"),
    ({"second_moment_dtype": "int8"}, r"second_moment_dtype='int8' without factorize_second_moment=False"),
    ({"factorize_second_moment": "no"}, r"factorize_second_moment='no': must be one of True, False"),
    ({"seed": -1}, r"seed=-1: must be an integer from 0 to 2\*\*63 - 1"),
    ({"seed": 2**63}, r"seed=9223372036854775808: must be"),
    ({"projection": "svd"}, r"projection='svd': must be one of 'sign', 'adaptive', 'gaussian'"),
    ({"residual": "yes"}, r"residual='yes': must be one of None, True, False"),
    (
        {"embedding_momentum": "some"},
        r"embedding_momentum='some': must be one of 'none', 'full', 'compressed'",
    ),
    ({"state_dtype": "int2"}, r"state_dtype='int2': must be one of 'float32', 'bfloat16', 'int8', 'int4'"),
    ({"state_dtype": torch.float16}, r"state_dtype=torch.float16: must be one of"),
    ({"projection": "gaussian", "residual": True}, r"residual=True with projection='gaussian'.*'sign'"),
    ({"projection": "adaptive", "residual": False}, r"residual=False with projection='adaptive'.*'sign'"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: str(w[0]) if isinstance(w, tuple) else None)
def test_the_constructor_and_a_group_refuse_alike(wrong: tuple[dict[str, Any], str]) -> None:
    given, message = wrong
    with pytest.raises(ValueError, match=message):
        Flora([parameter()], **{"lr": 1e-3} | given)
    if given not in ({"rank": None}, {"warmup_init": True}):
        with pytest.raises(ValueError, match=message):
            Flora([{"params": [parameter()], **given}], lr=1e-3, rank=8)


def test_the_positional_order_is_that_of_flora_opt() -> None:
    names = list(inspect.signature(Flora).parameters)
    assert names[:15] == [
        "params",
        "lr",
        "rank",
        "kappa",
        "eps",
        "clip_threshold",
        "decay_rate",
        "beta1",
        "weight_decay",
        "scale_parameter",
        "relative_step",
        "warmup_init",
        "factorize_second_moment",
        "seed",
        "ratio",
    ]


def test_the_drop_in_compresses() -> None:
    """flora-opt's own drop-in passes no rank and no beta1, and compresses nothing."""
    optimizer = Flora([torch.nn.Parameter(torch.zeros(512, 512))], lr=1e-3)
    assert optimizer.report().compressed == 1
    assert optimizer.param_groups[0]["rank"] == 128


def test_a_whole_second_moment_leaves_momentum_compressed() -> None:
    """In flora-opt, factorize_second_moment=False silently turns momentum compression off."""
    param = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = Flora([param], lr=1e-3, rank=16, factorize_second_moment=False)
    assert optimizer.state[param]["exp_avg"].shape == (64, 16)
    assert optimizer.state[param]["variance"].shape == (64, 64)


def test_a_groups_rank_replaces_the_constructors_ratio_and_the_other_way_round() -> None:
    wide = [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(3)]
    optimizer = Flora(
        [{"params": wide[:1]}, {"params": wide[1:2], "rank": 8}, {"params": wide[2:], "ratio": 2}],
        lr=1e-3,
        ratio=4,
    )
    assert [row.ratio for row in optimizer.report().rows] == [4, 8, 2]
    assert [(g["rank"], g["ratio"]) for g in optimizer.param_groups] == [(None, 4), (8, None), (None, 2)]
    by_rank = Flora([{"params": wide[:1]}, {"params": wide[1:], "ratio": 2}], lr=1e-3, rank=8)
    assert [(g["rank"], g["ratio"]) for g in by_rank.param_groups] == [(8, None), (None, 2)]


def test_numpy_numbers_are_numbers() -> None:
    optimizer = Flora([parameter()], lr=np.float64(1e-3), rank=np.int64(8), seed=np.int32(3))
    assert optimizer.report().rows[0].ratio == 4


def test_residual_follows_the_projection() -> None:
    for projection, residual in (("sign", True), ("adaptive", True), ("gaussian", False)):
        [group] = Flora([parameter()], lr=1e-3, rank=8, projection=projection).param_groups
        assert group["residual"] is residual


def test_every_option_of_the_constructor_is_checked() -> None:
    """All but the one that has no effect."""
    given = set(inspect.signature(Flora).parameters) - {"params", "compile"}
    assert given == set(options._CHECKS) - {"kind"}


@pytest.mark.parametrize("group", [False, True])
def test_a_keyword_of_flora_opt_is_named_with_ours(group: bool) -> None:
    named = {"quantization": True}
    params = [{"params": [parameter()], **(named if group else {})}]
    with pytest.raises(
        TypeError, match=r"^quantization= is flora-opt's keyword, .*: write state_dtype='int8' for True"
    ):
        Flora(params, lr=1e-3, **({} if group else named))
    assert "quantization" not in inspect.signature(Flora).parameters
