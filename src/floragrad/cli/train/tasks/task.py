"""Interface of a task: its data, its model, its loss, and what it measures beside the loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.data import Data, Example, Examples

if TYPE_CHECKING:
    from torch import Tensor


class Task(ABC):
    """A kind of model with its data. Methods that take a model import torch; the others need none.

    Attributes:
        data: What :meth:`prepare` writes.
        auto_class: Name of transformers' class for such models.
        blocks: Held-out blocks, in words.
        everything: What they are drawn from, in words.
    """

    data: ClassVar[type[Data]]
    auto_class: ClassVar[str]
    blocks: ClassVar[str]
    everything: ClassVar[str]

    @abstractmethod
    def prepare(self, config: RunConfig, folder: Path) -> Data:
        """Read the data of a run and write them to a new folder."""

    def load(self, folder: Path) -> Data:
        """Open the output of :meth:`prepare`."""
        return self.data.load(folder)

    @abstractmethod
    def build(self, config: RunConfig, data: Any) -> Any:
        """Return the model to train, drawn from the global generator where it has no weights."""

    def collate(self, blocks: list[Example]) -> dict[str, Any]:
        """Return a batch of tensors."""
        from transformers import default_data_collator

        batch: dict[str, Any] = default_data_collator(blocks)
        return batch

    def loss(self, model: Any, batch: Mapping[str, Any]) -> "Tensor":
        """Return the loss to train with: the mean over the blocks of a batch, however it is divided."""
        return self.examine(model, batch)["loss"].mean()

    @abstractmethod
    def examine(self, model: Any, batch: Mapping[str, Any]) -> "dict[str, Tensor]":
        """Return the ``"loss"`` of each block, and other measures that are means over blocks."""

    def measure(
        self,
        model: Any,
        config: RunConfig,
        blocks: Examples,
        processor: Any,
        move: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> dict[str, float]:
        """Return measures of the validation sample as a whole, the same in all processes, which all call it.

        ``move`` moves a batch to the model's device.
        """
        _ = model, config, blocks, processor, move
        return {}
