"""Train a UNet of diffusers to remove noise: DDPM on Fashion-MNIST.

Shows Flora on convolutions: a kernel (out, in, height, width) is one matrix of out rows, whose columns are compressed.
``GradientAccumulator`` keeps the sum of two micro-batches. A DiT is used in the same way.

Needs ``floragrad[torch]`` and ``diffusers``. Reads Debian's package ``dataset-fashion-mnist`` if it is installed; the
images are disks of random places and sizes otherwise.
"""

import argparse
import gzip
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from floragrad import Flora, GradientAccumulator, param_groups

FILE = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
BATCH, MICRO_BATCHES = 16, 2


def images() -> Tensor:
    """Return pixels between -1 and 1, (n, 1, 28, 28)."""
    if FILE.is_file():
        data = gzip.decompress(FILE.read_bytes())[16:]
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, 1, 28, 28) / 127.5 - 1
    grid = torch.stack(torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")).float()
    distance = (grid - torch.randint(8, 20, (1024, 2, 1, 1))).norm(dim=1, keepdim=True)
    return (distance < torch.randint(3, 9, (1024, 1, 1, 1))).float() * 2 - 1


def main(steps: int) -> None:
    """Train for a number of updates."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels = images()
    model = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ).to(device)
    noising = DDPMScheduler(num_train_timesteps=1000)

    optimizer = Flora(param_groups(model, lr=1e-3), rank=8)
    print(optimizer.report())

    with GradientAccumulator(optimizer, steps=MICRO_BATCHES) as accumulator:
        for step in range(1, steps + 1):
            total = 0.0
            for _ in range(MICRO_BATCHES):
                clean = pixels[torch.randint(len(pixels), (BATCH,))].to(device)
                noise, times = torch.randn_like(clean), torch.randint(1000, (BATCH,), device=device)
                predicted = model(noising.add_noise(clean, noise, times), times).sample
                loss = nn.functional.mse_loss(predicted, noise)
                accumulator.backward(loss)
                total += loss.item() / MICRO_BATCHES
            accumulator.clip_grad_norm_(1.0)
            accumulator.step()
            if step == 1 or step % 5 == 0 or step == steps:
                print(f"step {step}: loss {total:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
