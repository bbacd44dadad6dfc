"""The report's bytes are the state's bytes, exactly; its peers' bytes are the peers'."""

import json
from xml.etree import ElementTree

import pytest
import torch
from transformers.optimization import Adafactor

from floragrad import Flora, GradientAccumulator
from floragrad._text import format_bytes
from floragrad.torch import Report
from floragrad.torch.accumulation import AccumulatorReport
from tests.torch.cases import CASES, Case

pytestmark = pytest.mark.filterwarnings("ignore:Flora compresses")


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


def reported(optimizer: Flora) -> tuple[int, int, int]:
    """The bytes of the report, of the state that is there, and of the one that AdamW would have."""
    report = optimizer.report()
    return report.state_bytes, bytes_of(dict(optimizer.state)), report.adamw_bytes


def test_frozen_tensors_count_when_they_have_a_state() -> None:
    """Frozen from the start, trained, frozen in between: as the state that is there, and AdamW's."""
    first, second = (torch.nn.Parameter(torch.ones(48, 48)) for _ in range(2))
    second.requires_grad_(False)
    optimizer = Flora([first, second], lr=1e-3, rank=8)
    one = Flora([torch.nn.Parameter(torch.ones(48, 48))], lr=1e-3, rank=8).report()
    assert reported(optimizer) == (one.state_bytes, one.state_bytes, one.adamw_bytes)
    text = str(optimizer.report())
    assert "frozen: no state" in text
    assert "1 of 1 tensor (1 more frozen) keep a sketch" in text
    second.requires_grad_(True)
    assert reported(optimizer) == (2 * one.state_bytes, 2 * one.state_bytes, 2 * one.adamw_bytes)
    second.grad = torch.ones(48, 48)
    optimizer.step()
    second.requires_grad_(False)
    assert reported(optimizer) == (2 * one.state_bytes, 2 * one.state_bytes, 2 * one.adamw_bytes)


def test_adapters_beside_a_frozen_model() -> None:
    """All parameters are given to the optimizer; only the adapters' count, whole and in low-bit storage."""
    base = [torch.nn.Parameter(torch.zeros(64, 64), requires_grad=False) for _ in range(4)]
    factors = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 64), (64, 4))]
    adapters_only = torch.optim.AdamW(factors)
    for factor in factors:
        factor.grad = torch.ones_like(factor)
    adapters_only.step()
    optimizer = Flora([*base, *factors], lr=1e-3)
    momentum = 4 * 64 + 4 * 4 + 64 * 4 + 4 * 64  # int8 and a scale for each begun block of 64
    kept = momentum + 2 * (4 * (4 + 64) + 16)
    assert reported(optimizer) == (kept, kept, bytes_of(dict(adapters_only.state)))
    assert {row.momentum for row in optimizer.report().rows[4:]} == {"whole"}


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


def small_reports() -> list[Report | AccumulatorReport]:
    named = [("a<b>&", torch.nn.Parameter(torch.zeros(64, 64))), ("bias", torch.nn.Parameter(torch.zeros(64)))]
    optimizer = Flora(named, lr=1e-3, rank=8)
    with GradientAccumulator(optimizer, steps=2) as accumulator:
        return [optimizer.report(), accumulator.report()]


@pytest.mark.parametrize("number", [0, 1], ids=["Report", "AccumulatorReport"])
def test_a_notebook_shows_the_cells_of_the_text(number: int) -> None:
    report = small_reports()[number]
    page = ElementTree.fromstring(f"<page>{report._repr_html_().replace('<br>', '<br/>')}</page>")
    table = [[cell.text or "" for cell in line] for line in page.iter("tr")]
    lines = str(report).splitlines()
    assert [row[0] for row in table] == ["parameter", "a<b>&", "bias"]
    assert [" ".join(row).split() for row in table] == [lines[line].split() for line in (0, 2, 3)]
    assert [text for paragraph in page.iter("p") for text in paragraph.itertext()] == lines[5:]


@pytest.mark.parametrize("number", [0, 1], ids=["Report", "AccumulatorReport"])
def test_rows_are_plain_values(number: int) -> None:
    report = small_reports()[number]
    records = report.to_dicts()
    assert [record["name"] for record in json.loads(json.dumps(records))] == ["a<b>&", "bias"]
    frame = report.to_pandas()
    assert list(frame.columns) == list(records[0])
    assert frame["state_bytes"].sum() == report.state_bytes
