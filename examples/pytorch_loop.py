"""Train a language model in a plain PyTorch loop, with accumulation, clipping and a schedule.

Shows ``Flora`` in the place of AdamW, and ``GradientAccumulator`` in the place of ``loss.backward()``: the gradients of
four micro-batches are kept in four bits per element, and each is freed as soon as it is used.

Needs ``floragrad[torch]``; uses a GPU if there is one. The text is the source of Python's standard library, as bytes.
"""

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from floragrad import Flora, GradientAccumulator, param_groups

LENGTH, BATCH, MICRO_BATCHES = 128, 8, 4


class ByteModel(nn.Module):
    """A small decoder over the 256 bytes."""

    def __init__(self, width: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next byte at each position."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        hidden = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.blocks(hidden, mask=mask, is_causal=True))


def batches(device: str) -> Iterator[Tensor]:
    """Yield random pieces of the text, (batch, length + 1), without end."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    while True:
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1))
        yield text[starts + torch.arange(LENGTH + 1)].long().to(device)


def main(steps: int) -> None:
    """Train for a number of updates."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, data = ByteModel().to(device), batches(device)

    # before: optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = Flora(param_groups(model, lr=1e-3, embedding_lr=1e-2, weight_decay=0.01), rank=32)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    print(optimizer.report())

    with GradientAccumulator(optimizer, steps=MICRO_BATCHES) as accumulator:
        for step in range(1, steps + 1):
            losses = []
            for _ in range(MICRO_BATCHES):
                tokens = next(data)
                loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
                accumulator.backward(loss)
                losses.append(loss.detach())
            norm = accumulator.clip_grad_norm_(1.0)
            accumulator.step()  # updates tensor by tensor; there is nothing to zero
            scheduler.step()
            print(f"step {step}: loss {torch.stack(losses).mean():.4f}, gradient norm {norm:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
