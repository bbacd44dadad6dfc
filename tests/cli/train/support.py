"""A corpus, a model and runs that take a second."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config

from floragrad.cli import main
from floragrad.cli.compare import worker
from floragrad.cli.errors import StoppedError
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.corpus import train_tokenizer
from floragrad.cli.train.display import Display
from floragrad.cli.train.folder import RunFolder
from floragrad.cli.train.run import begin, train

WORDS = ("the", "of", "and", "to", "in", "is", "that", "model", "token", "step", "loss", "rate", "sketch", "sign")
TIMES = ("seconds", "step_seconds", "memory_bytes")
"""Columns of the metrics that differ between two runs of the same thing."""
FAST = {
    **{"steps": 8, "batch_size": 2, "sequence_length": 16, "vocab_size": 300, "threads": 1},
    **{"eval_blocks": 4, "eval_every": 4, "save_every": 4},
}
"""A run that takes about a second."""


def write_texts(folder: Path, documents: int = 12, words: int = 400) -> Path:
    """Write files of random words, always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    for number in range(documents):
        text = " ".join(generator.choices(WORDS, k=words))
        (folder / f"document{number:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def write_gpt2(folder: Path, texts: Path, dropout: float = 0.2) -> Path:
    """A folder with a small GPT-2's configuration and tokenizer. Its dropout draws random numbers."""
    tokenizer = train_tokenizer([path.read_text(encoding="utf-8") for path in sorted(texts.iterdir())], 300)
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 2, "n_positions": 32}
    GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes, **rates).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fast_config(texts: Path, **options: Any) -> RunConfig:
    """A configuration of a run that takes about a second."""
    fast = dict(FAST)
    if options.get("model", "tiny") != "tiny":
        del fast["vocab_size"]
    return RunConfig.resolve(text=(str(texts),), **{**fast, **options})


def quiet() -> Display:
    """A display that shows nothing."""
    return Display(Console(quiet=True))


def save_nothing(_figure: object, path: Path) -> None:
    """Take the place of ``figures.save`` where nobody looks at the picture, which takes as long as the steps."""
    path.write_bytes(b"")


def run(config: RunConfig, out: Path) -> RunFolder:
    """Begin a run and train it to its end."""
    folder = begin(config, out)
    train(folder, quiet())
    return folder


def timeless(folder: RunFolder) -> list[dict[str, Any]]:
    """The metrics without what differs from run to run."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in folder.metrics()]


def newest(folder: RunFolder) -> Path:
    """The newest checkpoint."""
    return folder.checkpoints()[-1][1]


def saved_state(folder: RunFolder) -> list[torch.Tensor]:
    """The tensors of the optimizer's state in the newest checkpoint."""
    state = torch.load(newest(folder) / "optimizer.pt", weights_only=True)["state"]
    return [value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)]


def tree(folder: Path) -> list[str]:
    """Everything below a folder, to see that nothing was made or lost."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def command(*arguments: object) -> int:
    """Run the command line in this process."""
    return main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a wrong request gets."""
    capsys.readouterr()
    assert command(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("floragrad: ")
    return lines[0].removeprefix("floragrad: ")


def read_json(path: Path) -> Any:
    """A JSON file's content."""
    return json.loads(path.read_text(encoding="utf-8"))


def load_tokenizer(folder: Path) -> Any:
    """A tokenizer as a user loads it."""
    return AutoTokenizer.from_pretrained(folder)


class Meddler(Display):
    """A display that does something at a step."""

    def __init__(self, step: int, action: object) -> None:
        super().__init__(Console(quiet=True))
        self._at, self._action = step, action

    def step(self, step: int, loss: float, tokens_per_second: float, memory: int) -> None:
        if step == self._at:
            if isinstance(self._action, signal.Signals):
                signal.raise_signal(self._action)
            else:
                raise self._action


class Here:
    """Runs the workers of a comparison in this process, where they need no second to start, and counts them."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.stop_before: int | None = None

    def train(self, runner: object, path: Path, title: str) -> None:
        if len(self.titles) == self.stop_before:
            raise StoppedError(path, "compare")
        self.titles.append(title)
        assert worker.main(path, title) == 0


def interrupt(config: RunConfig, out: Path, *steps: int) -> RunFolder:
    """Stop a run after each of some steps, then let it end. The signal comes while the step before is written."""
    folder = begin(config, out)
    for step in steps:
        with pytest.raises(StoppedError):
            train(folder, Meddler(step - 1, signal.SIGINT))
        assert [number for number, _ in folder.checkpoints()] == [step]
    train(folder, quiet())
    return folder


def assert_same_run(folder: RunFolder, other: RunFolder) -> None:
    """The two runs have the same metrics, but for the time they took, and the same weights."""
    assert timeless(folder) == timeless(other)
    weights, expected = (load_file(newest(one) / "model.safetensors") for one in (folder, other))
    assert weights.keys() == expected.keys()
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name
