"""One run of a comparison, in a process of its own: a fresh allocator, a peak of memory of its own."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from floragrad.cli import machine
from floragrad.cli.errors import DivergenceError, StoppedError, UserError
from floragrad.cli.train.folder import RunFolder


def command(path: Path, title: str) -> list[str]:
    """Return the command that trains the run in ``path`` in a process of its own."""
    return [sys.executable, "-m", "floragrad.cli.compare.worker", str(path), title]


def outcome(summary: Mapping[str, Any]) -> str:
    """Return the result of a finished run in words."""
    loss = summary["validation_loss"]
    return f"diverged at step {summary['diverged_at']}" if loss is None else f"validation loss {loss:.4f}"


def main(path: Path, title: str) -> int:
    """Train the run in ``path`` to its end. Returns 0, or 128 + the signal that stopped it.

    A diverged run is a result here: its summary says so.
    """
    try:
        folder = RunFolder.open(path)
        config = folder.config
        machine.prepare(config.backend, hub=config.uses_hub)
        from floragrad.cli.train.display import Display
        from floragrad.cli.train.run import train

        train(folder, Display(Console(), title, brief=True))
    except DivergenceError as error:
        folder.write_summary({"optimizer": config.optimizer, "validation_loss": None, "diverged_at": error.step})
        folder.tidy(checkpoints=False)
    except StoppedError as error:
        return error.exit_code
    except UserError as error:
        print("floragrad:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
