"""Train a sharded model with FSDP2: each process keeps a shard of weights, gradients, state and sketches.

Shows that Flora steps FSDP2's shards without an option, with the same result as whole tensors up to the order of sums,
that micro-batches accumulate in sketches of the shards, and that clipping uses the norm of all shards.

Needs ``floragrad[torch]``. Start it with ``torchrun --nproc-per-node 2 examples/fsdp2.py``; without torchrun it is a
group of one process. Its text is the source of Python's standard library, as bytes.
"""

import argparse
import os
import sysconfig
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from floragrad import Flora, GradientAccumulator, param_groups

LENGTH, BATCH, MICRO_BATCHES = 32, 16, 2


def start() -> torch.device:
    """Join the group that torchrun starts, or make a group of one; return this process's device."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29400")
    on_gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    return device


def main(steps: int) -> None:
    """Train for a number of updates."""
    device = start()
    rank, world = distributed.get_rank(), distributed.get_world_size()
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    torch.manual_seed(0)  # the same weights everywhere
    hidden = [nn.Linear(LENGTH * 32, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU()]
    model = nn.Sequential(nn.Embedding(256, 32), nn.Flatten(), *hidden, nn.Linear(512, 256)).to(device)
    mesh = init_device_mesh(device.type, (world,))
    for layer in (module for module in model if isinstance(module, nn.Linear)):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    optimizer = Flora(param_groups(model, lr=1e-3, embedding_lr=1e-2), rank=32)  # after sharding
    if rank == 0:
        print(optimizer.report())

    torch.manual_seed(rank)  # other data in each process
    with GradientAccumulator(optimizer, steps=MICRO_BATCHES) as accumulator:
        for step in range(1, steps + 1):
            for _ in range(MICRO_BATCHES):
                pieces = data[torch.randint(len(data) - LENGTH, (BATCH, 1)) + torch.arange(LENGTH + 1)].to(device)
                loss = nn.functional.cross_entropy(model(pieces[:, :-1]), pieces[:, -1])
                accumulator.backward(loss)
            accumulator.clip_grad_norm_(1.0)
            accumulator.step()
            distributed.all_reduce(mean := loss.detach() / world)
            if rank == 0 and (step == 1 or step % 10 == 0 or step == steps):
                print(f"step {step}: loss {mean.item():.4f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
