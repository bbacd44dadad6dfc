"""Every kernel compiles for GPUs of three kinds with the constants of GPT-2 small and Llama-3-8B; none spills."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.torch.compiled import CASES, FOLDS, TARGETS

# Each kernel, and each way of compiling it that differs much, for one GPU: all of them are among the slow tests.
CHOSEN = (
    "llama-down-int4:gfx942",
    "llama-adaptive:sm_90",
    "norm:sm_80",
    "fold-ratio-32:sm_90",
)


def assert_nothing_spills(pairs: Iterable[str], cache: Path) -> None:
    """Compile in a process without the interpreter, which replaces what compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.torch.compiled", *pairs]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    usages = [json.loads(line) for line in found.stdout.splitlines()]
    assert usages
    assert [each for each in usages if each["spills"]] == []


def test_kernels_compile_and_spill_nothing(tmp_path: Path) -> None:
    assert_nothing_spills(CHOSEN, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_case_compiles_for_every_gpu(target: str, tmp_path: Path) -> None:
    assert_nothing_spills((f"{case}:{target}" for case in [*CASES, *FOLDS]), tmp_path)
