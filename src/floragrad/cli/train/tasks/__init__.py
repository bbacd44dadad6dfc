"""The tasks of ``--task``."""

from typing import Final

from floragrad.cli.train.tasks.lm import LanguageModeling
from floragrad.cli.train.tasks.seq2seq import Translation
from floragrad.cli.train.tasks.task import Task
from floragrad.cli.train.tasks.vision import Vision

TASKS: Final[dict[str, Task]] = {"lm": LanguageModeling(), "seq2seq": Translation(), "vision": Vision()}
