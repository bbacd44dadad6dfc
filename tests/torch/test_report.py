"""The report's bytes are the state's bytes, exactly; its peers' bytes are the peers'."""

import pytest
import torch
from transformers.optimization import Adafactor

from floragrad import Flora
from floragrad._text import format_bytes
from tests.torch.cases import CASES, Case

pytestmark = pytest.mark.filterwarnings("ignore:Flora compresses no momentum")


def bytes_of(state: object) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(map(bytes_of, state.values())) if isinstance(state, dict) else 0


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_predicted_bytes_are_actual_bytes(case: Case, state_dtype: str) -> None:
    """Before and after a step, and the storages hold no more than the tensors show."""
    param = case.parameter()
    optimizer = Flora([param], **case.all_options(state_dtype=state_dtype))
    predicted = optimizer.report().state_bytes
    for _ in range(2):
        assert bytes_of(optimizer.state[param]) == predicted
        stored = sum(value.untyped_storage().nbytes() for value in optimizer.state[param].values())
        assert stored == predicted
        param.grad = torch.ones_like(param)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (24, 40), (16, 3, 3, 3), (3, 16, 40)], ids=str)
def test_peers_bytes_are_the_peers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    report = Flora([param], lr=1e-3).report()
    param.grad = torch.ones_like(param)
    adamw = torch.optim.AdamW([param])
    adafactor = Adafactor([param], lr=1e-3, beta1=0.9, relative_step=False, scale_parameter=False)
    for peer, predicted in ((adamw, report.adamw_bytes), (adafactor, report.adafactor_bytes)):
        peer.step()
        # Hugging Face's Adafactor keeps the parameter's RMS for the step at hand: a scalar, not state.
        state = {key: value for key, value in peer.state[param].items() if key != "RMS"}
        assert bytes_of(state) == predicted


def test_the_table() -> None:
    named = [
        ("embed", torch.nn.Parameter(torch.zeros(10000, 64))),
        ("layer", torch.nn.Parameter(torch.zeros(64, 64))),
        ("small", torch.nn.Parameter(torch.zeros(10, 12))),
        ("experts", torch.nn.Parameter(torch.zeros(4, 64, 96))),
        ("bias", torch.nn.Parameter(torch.zeros(64))),
    ]
    report = Flora(named, lr=1e-3, rank=16).report()
    lines = str(report).splitlines()
    assert lines[0].split() == ["parameter", "shape", "view", "ρ", "state", "kept"]
    cells = {line.split()[0]: line for line in lines[2:7]}
    assert cells["embed"].endswith("vocabulary-like, aspect 156 >= 8 and 10000 > 8192: no momentum")
    assert cells["layer"].split() == ["layer", "64x64", "64", "x", "64", "4", "1.8", "kB", "sketch"]
    assert cells["small"].endswith("rank 16 > 10 // 2: every column kept")
    assert "4 x 64 x 96" in cells["experts"]
    assert cells["bias"].endswith("vector: kept whole, in float32")
    assert report.compressed == 2
    assert lines[-4].startswith("2 of 5 tensors keep a sketch")
    assert f"AdamW: {format_bytes(report.adamw_bytes)}" in lines[-3]
    assert lines[-1] == f"updated by: {report.rows[0].path} 5"


def test_unnamed_parameters_go_by_position() -> None:
    optimizer = Flora([torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(2)], lr=1e-3, rank=8)
    assert [row.name for row in optimizer.report().rows] == ["parameter 0", "parameter 1"]
