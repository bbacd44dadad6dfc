"""Prepared data of a run: which examples it reads, in which order, and the sample that it validates with."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from floragrad.cli.disk import write_text
from floragrad.cli.train import manifest
from floragrad.cli.train.config import RunConfig

T = TypeVar("T")
D = TypeVar("D", bound="Data")
Example: TypeAlias = Mapping[str, NDArray[Any]]
HELD_OUT: Final = 10
"""Every tenth example is held out."""
_FACTS: Final = "corpus.json"


class Examples:
    """Examples in the order in which they are read: each once, or shuffled anew for every pass.

    The order follows from ``seed`` and the position alone, so that a run may start anywhere in it, and runs with
    different optimizers read the same batches.

    Args:
        read: Returns the example of an index.
        indices: Of the examples, or how many there are.
        seed: Of the shuffling; None keeps the order.
        total: Examples to serve; more than there are begin a further pass. None serves each once.
    """

    def __init__(
        self,
        read: Callable[[int], Example],
        indices: NDArray[np.int64] | int,
        seed: int | None = None,
        total: int | None = None,
    ) -> None:
        self._order: NDArray[np.int64] = np.arange(indices) if isinstance(indices, int) else indices
        self._read, self._seed, self._pass = read, seed, -1
        self._total = len(self._order) if total is None else total

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, position: int) -> Example:
        number, index = divmod(position, len(self._order))
        if self._seed is not None and number != self._pass:
            generator = np.random.Generator(np.random.Philox(key=[self._seed, number]))
            self._order, self._pass = generator.permutation(len(self._order)), number
        return self._read(int(self._order[index]))


@dataclass(frozen=True)
class Data(ABC):
    """A folder with a manifest and the facts of its data. An example is a block of tokens, a pair or an image.

    Attributes:
        folder: With the files of both parts.
        facts: For the summary and for readers of the folder, of the type ``facts_type``.
    """

    facts_type: ClassVar[type]
    folder: Path
    facts: Any

    @classmethod
    def load(cls: type[D], folder: Path) -> D:
        """Open prepared data."""
        return cls(folder, cls.facts_type(**json.loads((folder / _FACTS).read_text(encoding="utf-8"))))

    def saved(self: D) -> D:
        """Write the facts beside the files, and the manifest of all. Returns the data."""
        write_text(self.folder / _FACTS, json.dumps(asdict(self.facts), indent=2) + "\n")
        manifest.write(self.folder, self.folder.rglob("*"))
        return self

    @property
    def processor(self) -> Any:
        """The tokenizer, or what else a checkpoint is saved with; it has ``save_pretrained``."""
        return AutoTokenizer.from_pretrained(self.folder / "tokenizer", trust_remote_code=False)

    @abstractmethod
    def describe(self) -> str:
        """Return the data in one line."""

    @abstractmethod
    def counts(self, config: RunConfig) -> tuple[int, int]:
        """Count the examples to train on, and those held out."""

    @abstractmethod
    def reader(self, part: str, config: RunConfig) -> Callable[[int], Example]:
        """Return a function that reads an example of ``"train"`` or ``"validation"`` by its index."""

    def train_blocks(self, config: RunConfig) -> Examples:
        """Return the examples that the run trains on, in order, to its end."""
        total = config.steps * config.micro_batches * config.batch_size
        return Examples(self.reader("train", config), self.counts(config)[0], config.seed, total)

    def validation_blocks(self, config: RunConfig) -> Examples:
        """Return a sample of those held out, the same whatever the seed, the optimizer and the processes."""
        chosen = sampled(self.held_out_blocks(config), config.eval_blocks)
        return Examples(self.reader("validation", config), chosen)

    def held_out_blocks(self, config: RunConfig) -> int:
        """Count the held-out examples, of which :meth:`validation_blocks` is a sample."""
        return self.counts(config)[1]


def divide(examples: Sequence[T]) -> tuple[list[T], list[T]]:
    """Return the examples to train on, and those held out. It goes by position, never by chance.

    Example:
        >>> divide(range(12))
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11], [9])
    """
    train = [each for index, each in enumerate(examples) if index % HELD_OUT != HELD_OUT - 1]
    return train, list(examples[HELD_OUT - 1 :: HELD_OUT])


def sampled(examples: int, count: int) -> NDArray[np.int64]:
    """Draw ``count`` of ``examples`` indices without replacement and sort them; all where there are no more.

    The draw is fixed, so that all runs on the same data validate with the same examples, and a larger sample contains
    the smaller ones. It uses the generator's raw bits, which are the same in every version of NumPy.

    Example:
        >>> sampled(20, 4), sampled(20, 6)
        (array([ 0,  2, 11, 17]), array([ 0,  1,  2,  9, 11, 17]))
    """
    order = np.argsort(np.random.Philox(key=0).random_raw(examples), kind="stable")
    return np.sort(order[:count])
