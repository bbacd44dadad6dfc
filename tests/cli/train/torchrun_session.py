"""What each process of a torchrun does in the tests: commands one after another, for starting it takes seconds.

The plan is a JSON object of jobs by name: ``arguments`` of the command line; ``signal``: [rank, step], where one
process gets SIGINT in a step; ``die``: the step at which the leader is killed in the middle of its checkpoint. Exit
codes go to ``codes-RANK.json`` beside the plan.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from floragrad.cli import main
from floragrad.cli.presets import PRESETS
from tests.cli.one_layer import ONE_LAYER

RANK = int(os.environ["RANK"])


def _interrupted(rank: int, at: int) -> Any:
    """A step of the recorder in which one rank gets a signal."""
    from floragrad.cli.train.recorder import Recorder

    def step(self: Recorder, step: int, *args: Any, **kwargs: Any) -> Any:
        if (RANK, step) == (rank, at):
            signal.raise_signal(signal.SIGINT)
        return original(self, step, *args, **kwargs)

    original = Recorder.step
    return step


def _killed(at: int) -> Any:
    """A torch.save that writes half of a file of some step's checkpoint, and never comes back."""
    import torch

    def save(obj: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        original(obj, path, *args, **kwargs)
        if f"checkpoint-{at}" in str(path) and Path(path).name == "optimizer.pt":
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    original = torch.save
    return save


def run(job: dict[str, Any]) -> int:
    """Do one job. Returns its exit code."""
    if "die" in job:
        import torch

        torch.save = _killed(job["die"])
    if "signal" not in job:
        return main(job["arguments"])
    from floragrad.cli.train.recorder import Recorder

    original = Recorder.step
    Recorder.step = _interrupted(*job["signal"])  # type: ignore[method-assign]
    try:
        return main(job["arguments"])
    finally:
        Recorder.step = original  # type: ignore[method-assign]


def hurry() -> None:
    """Spare the next jobs what takes as long as their steps: a picture, and the garbage of what is imported by now."""
    from floragrad.cli.train import run as training
    from tests.cli.train.support import save_nothing

    training.save = save_nothing
    gc.freeze()


if __name__ == "__main__":
    PRESETS.update(ONE_LAYER)
    plan = Path(sys.argv[1])
    codes = {}
    for name, each in json.loads(plan.read_text()).items():
        if RANK == 0:
            print(f"job {name}", file=sys.stderr, flush=True)
        codes[name] = run(each)
        hurry()
        plan.with_name(f"codes-{RANK}.json").write_text(json.dumps(codes))
