"""Interface of a task: its data, its model, its loss, and what it measures beside the loss."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from numpy.typing import NDArray

from floragrad.cli.train.config import RunConfig

if TYPE_CHECKING:
    from torch import Tensor


class Blocks(Protocol):
    """Examples in the order in which they are read."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Mapping[str, NDArray[Any]]: ...


class Data(Protocol):
    """Prepared data of a run: a folder with a manifest. A block is an example: a block of tokens, a pair, an image."""

    @property
    def processor(self) -> Any:
        """The tokenizer, or what else a checkpoint is saved with; it has ``save_pretrained``."""
        ...

    def train_blocks(self, config: RunConfig) -> Blocks:
        """Return the blocks that the run trains on, in order, to its end."""
        ...

    def validation_blocks(self, config: RunConfig) -> Blocks:
        """Return a sample of the held-out blocks, the same whatever the seed, the optimizer and the processes."""
        ...

    def held_out_blocks(self, config: RunConfig) -> int:
        """Count the held-out blocks, of which :meth:`validation_blocks` is a sample."""
        ...

    def describe(self) -> str:
        """Return the data in one line."""
        ...


class Task(Protocol):
    """A kind of model with its data. Methods that take a model import torch; the others need none.

    Attributes:
        auto_class: Name of transformers' class for such models.
        blocks: Held-out blocks, in words.
        everything: What they are drawn from, in words.
    """

    auto_class: ClassVar[str]
    blocks: ClassVar[str]
    everything: ClassVar[str]

    def prepare(self, config: RunConfig, folder: Path) -> Data:
        """Read the data of a run and write them to a new folder.

        Raises:
            UserError: There are none, or they cannot be used.
        """
        ...

    def load(self, folder: Path) -> Data:
        """Open the output of :meth:`prepare`."""
        ...

    def build(self, config: RunConfig, data: Any) -> Any:
        """Return the model to train, drawn from the global generator where it has no weights."""
        ...

    def collate(self, blocks: list[Mapping[str, NDArray[Any]]]) -> dict[str, Any]:
        """Return a batch of tensors."""
        from transformers import default_data_collator

        batch: dict[str, Any] = default_data_collator(blocks)
        return batch

    def loss(self, model: Any, batch: Mapping[str, Any]) -> "Tensor":
        """Return the loss to train with: the mean over the blocks of a batch, however it is divided."""
        return self.examine(model, batch)["loss"].mean()

    def examine(self, model: Any, batch: Mapping[str, Any]) -> "dict[str, Tensor]":
        """Return the ``"loss"`` of each block, and other measures that are means over blocks."""
        ...

    def measure(
        self,
        model: Any,
        config: RunConfig,
        blocks: Blocks,
        processor: Any,
        move: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> dict[str, float]:
        """Return measures of the validation sample as a whole, the same in all processes, which all call it.

        Args:
            model: To measure.
            config: Of the run.
            blocks: The sample.
            processor: Of the data.
            move: Moves a batch to the model's device.
        """
        _ = model, config, blocks, processor, move
        return {}
