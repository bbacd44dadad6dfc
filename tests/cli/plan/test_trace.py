"""What a row is made of is imported before anything is traced."""

import subprocess
import sys

import pytest

FIRST_AND_SECOND = """
import sys
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from floragrad.cli.plan.engine import plan_subject
from tests.cli.plan.engine_cases import Combination, subject
case = Combination("llama", "adafactor")
first, second = (plan_subject(subject(case.kind, 1), case.settings) for _ in range(2))
assert first == second, (first.to_json(), second.to_json())
values = [value for module in list(sys.modules.values()) for value in getattr(module, "__dict__", {}).values()]
tensors = [value for value in values if isinstance(value, Tensor)]
assert tensors and not [value for value in tensors if isinstance(value, FakeTensor) or value.is_meta]
"""


@pytest.mark.slow
def test_a_process_first_trace_is_like_all_others() -> None:
    """The libraries' own tensors, made as they are imported, are neither counted nor fake from then on."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST_AND_SECOND], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
