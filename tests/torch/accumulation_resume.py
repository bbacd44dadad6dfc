"""Half of a run in one process, the other half in another; see ``test_accumulation_resume.py``.

    python -m tests.torch.accumulation_resume FOLDER

finishes every checkpoint of the folder and writes its parameters beside it.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from floragrad import Flora, GradientAccumulator
from tests.torch.accumulation_cases import STEPS, Net, flat

WINDOWS = 3
STOPS = [STEPS + 1, STEPS + 2, STEPS + 3, 2 * STEPS]
"""Micro-batches after which the run is interrupted: everywhere in the second window, and at its end."""

RUNS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "sketched": {"dtype": torch.float32, "ratio": 2},
    "in-backward": {"dtype": torch.bfloat16, "clip": False},
    "materialise": {"dtype": torch.float32, "optimizer": "adamw"},
}


class Run:
    """A model, its optimizer and its accumulator."""

    def __init__(self, dtype: torch.dtype, optimizer: str = "flora", **options: Any) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Net(gated=True).to(dtype)
        params = self.model.parameters()
        self.optimizer: torch.optim.Optimizer = (
            Flora(params, lr=1e-2, ratio=4, kappa=2) if optimizer == "flora" else torch.optim.AdamW(params, lr=1e-2)
        )
        self.accumulator = GradientAccumulator(self.optimizer, STEPS, **options)
        self.clips = options.get("clip") is not False

    def go(self, first: int, last: int) -> None:
        """Micro-batches from ``first`` up to, not including, ``last``; windows are stepped when complete."""
        for number in range(first, last):
            generator = torch.Generator().manual_seed(number)
            self.accumulator.backward(self.model(torch.randint(0, 200, (2, 7), generator=generator)))
            if self.accumulator.complete:
                if self.clips:
                    self.accumulator.clip_grad_norm_(0.5)
                self.accumulator.step()

    def state(self) -> dict[str, Any]:
        parts = ("model", "optimizer", "accumulator")
        return {part: getattr(self, part).state_dict() for part in parts}

    def load(self, state: dict[str, Any]) -> None:
        for part, value in state.items():
            getattr(self, part).load_state_dict(value)

    def result(self) -> Tensor:
        return flat(self.model)


def main(folder: Path) -> None:
    for path in sorted(folder.glob("*.pt")):
        name, stop = path.stem.rsplit("-", 1)
        run = Run(**RUNS[name])
        run.load(torch.load(path, weights_only=True))
        run.go(int(stop), WINDOWS * STEPS)
        torch.save(run.result(), path.with_suffix(".result"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
