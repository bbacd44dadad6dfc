"""Train with Lightning: an optimizer in ``configure_optimizers``, and a callback that accumulates in sketches.

Shows ``FloraAccumulation``: ``accumulate_grad_batches`` and ``gradient_clip_val`` keep their meaning, and gradients are
kept in four bits per element and updated tensor by tensor.

Needs ``floragrad[lightning]``. The text is the source of Python's standard library, as bytes.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from floragrad import Flora, param_groups
from floragrad.lightning import FloraAccumulation

LENGTH = 32


class NextByte(LightningModule):
    """Predict a byte from the ones before it."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(LENGTH * 32, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU()]
        self.layers = nn.Sequential(nn.Embedding(256, 32), nn.Flatten(), *hidden, nn.Linear(512, 256))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of a micro-batch."""
        tokens, target = batch
        loss = nn.functional.cross_entropy(self.layers(tokens), target)
        if index % 20 == 0 or index + 1 == self.trainer.num_training_batches:
            print(f"micro-batch {index}: loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self) -> Flora:
        """Return the optimizer."""
        return Flora(param_groups(self, lr=1e-3, embedding_lr=1e-2), rank=32)


def main(steps: int) -> None:
    """Train for a number of updates, of two micro-batches each."""
    seed_everything(0, verbose=False)
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    pieces = data[torch.randint(len(data) - LENGTH, (steps * 64, 1)) + torch.arange(LENGTH + 1)]
    loader = DataLoader(TensorDataset(pieces[:, :-1], pieces[:, -1]), batch_size=32)

    accumulation = FloraAccumulation()
    trainer = Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[accumulation],
        logger=False,  # yours: the loggers that you use
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(NextByte(), loader)
    print(f"gradient norm of the last window: {accumulation.grad_norm:.3f}")
    print(accumulation.accumulator.report())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
