"""Errors that end a command on purpose."""

import signal
from pathlib import Path


class UserError(Exception):
    """The request cannot be met. The message is one line: the value, the allowed values, the remedy.

    Functions that "refuse" something raise it.
    """


class StorageError(UserError):
    """The run's folder could not be written. Of several processes, the one that wrote says so."""


class DivergenceError(Exception):
    """The training loss stopped being a finite number, at ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is not a finite number any more at step {step}: give a lower --lr")
        self.step = step


class StoppedError(Exception):
    """A signal ended the run after its step was finished and everything was saved.

    Attributes:
        folder: The folder that continues it.
        exit_code: 128 + the signal's number, as a shell reports it.
    """

    def __init__(self, folder: Path, command: str, signum: int = signal.SIGINT) -> None:
        super().__init__(f"stopped and saved; continue with: {command} --resume {folder}")
        self.folder = folder
        self.exit_code = 128 + signum


class LostError(Exception):
    """Another process of the same run is gone, or does not answer. Every process that is left says so."""
