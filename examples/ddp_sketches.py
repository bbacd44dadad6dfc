"""Train with DistributedDataParallel, and send sketches of the gradients instead of the gradients.

Shows ``flora_hook``: a bucket's matrices are sent with 1/ρ of their columns, in one all-reduce, with other signs in
each step, so that the mean is unbiased. Any optimizer works with it; ``Flora`` makes the state small, too.

Needs ``floragrad[torch]``. Start it with ``torchrun --nproc-per-node 2 examples/ddp_sketches.py``; without torchrun it
is a group of one process. Its text is the source of Python's standard library, as bytes.
"""

import argparse
import os
import sysconfig
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from floragrad import Flora, FloraHookState, flora_hook, param_groups

LENGTH, BATCH = 32, 32


def start() -> torch.device:
    """Join the group that torchrun starts, or make a group of one; return this process's device."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29401")
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

    hidden = [nn.Linear(LENGTH * 32, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU()]
    model = nn.Sequential(nn.Embedding(256, 32), nn.Flatten(), *hidden, nn.Linear(512, 256)).to(device)
    wrapped = DistributedDataParallel(model)  # sends rank 0's weights to all
    wrapped.register_comm_hook(FloraHookState(ratio=4), flora_hook)
    optimizer = Flora(param_groups(model, lr=1e-3, embedding_lr=1e-2), rank=32)

    torch.manual_seed(rank)  # other data in each process
    for step in range(1, steps + 1):
        pieces = data[torch.randint(len(data) - LENGTH, (BATCH, 1)) + torch.arange(LENGTH + 1)].to(device)
        loss = nn.functional.cross_entropy(wrapped(pieces[:, :-1]), pieces[:, -1])
        loss.backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        distributed.all_reduce(mean := loss.detach() / world)
        if rank == 0 and (step == 1 or step % 10 == 0 or step == steps):
            print(f"step {step}: loss {mean.item():.4f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
