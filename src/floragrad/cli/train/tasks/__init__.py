"""The tasks of ``--task``."""

from typing import Final

from floragrad.cli.train.tasks.images import Vision
from floragrad.cli.train.tasks.lm import LanguageModeling
from floragrad.cli.train.tasks.seq2seq import Seq2Seq, bleu, rouge
from floragrad.cli.train.tasks.task import Task

TASKS: Final[dict[str, Task]] = {
    "lm": LanguageModeling(),
    "seq2seq": Seq2Seq("seq2seq", "sacrebleu", bleu, cuts=False),
    "summarization": Seq2Seq("summarization", "rouge_score", rouge, cuts=True),
    "vision": Vision(),
}
