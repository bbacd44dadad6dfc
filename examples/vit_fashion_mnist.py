"""Train a ViT on Fashion-MNIST: patches by a convolution, matrices by a transformer.

Shows how ``param_groups`` treats a vision model: the convolution's kernel and the matrices are compressed, the class
token, positions and norms are kept whole and without weight decay. A model of timm (``timm.create_model``) or
torchvision is used in the same way.

Needs ``floragrad[transformers]``. Reads Debian's package ``dataset-fashion-mnist`` if it is installed; the images are
drawn at random, a pattern for each class, otherwise.
"""

import argparse
import gzip
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from floragrad import Flora, param_groups

FOLDER = Path("/usr/share/datasets/fashion-mnist")


def images() -> tuple[Tensor, Tensor]:
    """Return pixels between -1 and 1, (n, 1, 28, 28), and classes from 0 to 9, (n,)."""
    if FOLDER.is_dir():
        pixels, labels = (
            torch.frombuffer(bytearray(gzip.decompress((FOLDER / name).read_bytes())[header:]), dtype=torch.uint8)
            for name, header in (("train-images-idx3-ubyte.gz", 16), ("train-labels-idx1-ubyte.gz", 8))
        )
        return pixels.view(-1, 1, 28, 28) / 127.5 - 1, labels.long()
    labels = torch.randint(10, (2048,))
    return torch.randn(10, 1, 28, 28)[labels] + 0.5 * torch.randn(2048, 1, 28, 28), labels


def main(steps: int) -> None:
    """Train for a number of updates, and count the right answers in the last ones."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels, labels = images()
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(image_size=28, patch_size=7, num_channels=1, num_labels=10, **sizes))
    model.to(device).train()

    optimizer = Flora(param_groups(model, lr=1e-3, weight_decay=0.05), rank=16)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    print(optimizer.report())

    for step in range(1, steps + 1):
        chosen = torch.randint(len(labels), (64,))
        batch, target = pixels[chosen].to(device), labels[chosen].to(device)
        logits = model(pixel_values=batch).logits
        loss = nn.functional.cross_entropy(logits, target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step == 1 or step % 10 == 0 or step == steps:
            accuracy = (logits.argmax(1) == target).float().mean()
            print(f"step {step}: loss {loss.item():.4f}, accuracy {accuracy:.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
