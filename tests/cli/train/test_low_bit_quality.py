"""A library's optimizer does the job of ``floragrad train``, and its state is counted as it lies in memory."""

from pathlib import Path

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM

from benchmarks.low_bit_quality import Row, starter
from benchmarks.step.state import stored_bytes
from floragrad.cli.plan.closed_form import closed_form
from floragrad.cli.plan.result import PlanSettings
from floragrad.cli.train.run import begin, train
from tests.cli.train.support import fast_config, newest, quiet, run


def test_bitsandbytes_does_adamws_job_in_eight_bits(texts: Path, tmp_path: Path) -> None:
    config = fast_config(texts, optimizer="adamw")
    adamw = run(config, tmp_path / "adamw")
    folder = begin(config, tmp_path / "bitsandbytes")
    summary = train(folder, quiet(), start=starter(Row(peer="bitsandbytes")))
    ours, theirs = ([line["loss"] for line in each.metrics() if "loss" in line] for each in (folder, adamw))
    assert ours[0] == theirs[0]
    assert ours != theirs
    assert ours == pytest.approx(theirs, abs=0.05)
    model = AutoModelForCausalLM.from_pretrained(newest(folder))
    assert summary["optimizer_state_bytes"] == closed_form(model, "adamw-8bit", PlanSettings()).optimizer_state
    assert "bitsandbytes" in summary["versions"]


def test_stored_bytes_look_inside_and_count_what_is_shared_once() -> None:
    shared, other = torch.zeros(10), torch.zeros(3, dtype=torch.uint8)
    inside = TwoTensor(torch.zeros(5), torch.zeros(5))
    assert stored_bytes([shared, shared[2:], other, inside]) == 40 + 3 + 20 + 20
