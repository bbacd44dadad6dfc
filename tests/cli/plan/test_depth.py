"""A deep model's trace from two shallow ones is that of the deep model itself."""

from dataclasses import replace

import pytest

from floragrad.cli.plan.depth import SHALLOW, DepthError, deepened
from floragrad.cli.plan.trace import Trace, predict
from floragrad.cli.plan.tracker import Profiles
from tests.cli.plan.engine_cases import Combination, subject

DEEP = 6
CASES = [
    Combination("llama", "adamw"),
    Combination("llama", "flora+accumulator", "bfloat16", 3, checkpointing=True),
    Combination("llama", "lora", "bfloat16"),
    Combination("gpt2", "flora+release", "float32", 2),
    Combination("t5", "flora", "bfloat16", 2, checkpointing=True),
    Combination("experts", "adafactor", "bfloat16"),
    Combination("vit", "adamw-8bit"),
]


def traced(case: Combination, blocks: int, profiles: Profiles) -> Trace:
    return predict(subject(case.kind, DEEP), case.optimizer, case.settings, blocks, profiles)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_deep_trace_follows_from_shallow_ones(case: Combination) -> None:
    profiles: Profiles = {}
    shallow, deeper = (traced(case, blocks, profiles) for blocks in (SHALLOW, SHALLOW + 1))
    found, whole = deepened(shallow, deeper, DEEP), traced(case, DEEP, profiles)
    assert found.kept == whole.kept
    assert found.update == whole.update
    assert found.micro_batches == whole.micro_batches
    assert found.first == whole.first


def test_traces_that_do_not_fit_are_refused() -> None:
    case = CASES[0]
    shallow, deeper = (traced(case, blocks, {}) for blocks in (SHALLOW, SHALLOW + 1))
    with pytest.raises(DepthError, match="3 and 3 blocks"):
        deepened(shallow, shallow, DEEP)
    with pytest.raises(DepthError, match="moments of other"):
        deepened(replace(shallow, update=shallow.update[1:]), deeper, DEEP)
