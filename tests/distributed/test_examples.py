"""The examples of several processes, in two; what torchrun tells its processes, the workers have been told."""

import contextlib
import io
import runpy
import sys
from unittest.mock import patch

import pytest
from torch import distributed

from tests.distributed.conftest import Worlds
from tests.examples.test_examples import EXAMPLES, losses


def printed(rank: int, name: str) -> str:
    """What an example prints on a rank; the process group is there already, and stays."""
    output = io.StringIO()
    with (
        patch.object(sys, "argv", [name, "--steps", "10"]),
        patch.object(distributed, "init_process_group"),
        patch.object(distributed, "destroy_process_group", distributed.barrier),
        contextlib.redirect_stdout(output),
    ):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return output.getvalue()


@pytest.mark.parametrize("name", ["fsdp2.py", "ddp_sketches.py"])
def test_two_processes_train(worlds: Worlds, name: str) -> None:
    first, second = worlds(2).run(printed, name)
    found = losses(first)
    assert found[-1] < found[0]
    assert second == ""
