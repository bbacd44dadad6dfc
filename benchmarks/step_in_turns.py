"""Flora's step and fused AdamW's in one process, in turns, on GPT-2 small's layers: the least that can differ.

    python -m benchmarks.step_in_turns

``make bench`` gives every optimizer a process of its own, whose memory the machine places as it likes; that alone can
move a ratio by half on a shared machine. Here both step in the same process. Medians of each round's ratio, with
quartiles, over 25 rounds after 3. ``FLORAGRAD_KERNELS=eager`` in the environment measures PyTorch's code in place of
the native kernels.
"""

import argparse
import time
from collections.abc import Callable
from statistics import quantiles

import torch

from benchmarks.step.shapes import LAYERS, specs
from benchmarks.step.worker import ACTIVATION
from floragrad import Flora

WARM, ROUNDS = 3, 25
Optimizers = dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]


def optimizers() -> Optimizers:
    made: Optimizers = {"torch AdamW, fused": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True)}
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        made[f"Flora, {dtype}"] = lambda params, dtype=dtype: Flora(params, lr=1e-4, state_dtype=dtype)  # type: ignore[misc]
    for rank in (16, 256):
        made[f"Flora, int8, rank {rank}"] = lambda params, rank=rank: Flora(params, lr=1e-4, rank=rank)  # type: ignore[misc]
    made["Flora, no momentum"] = lambda params: Flora(params, lr=1e-4, beta1=None)
    return made


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    made = []
    for position, spec in enumerate(specs(LAYERS)):
        generator = torch.Generator().manual_seed(position)
        param = torch.nn.Parameter(torch.randn(spec.shape, generator=generator).mul_(0.02).to(dtype))
        param.grad = param.detach() * 0.05
        made.append(param)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's (default: all)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the parameters")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    made = {name: make(parameters(getattr(torch, given.dtype))) for name, make in optimizers().items()}
    print_in_turns({name: optimizer.step for name, optimizer in made.items()})


def print_in_turns(steps: dict[str, Callable[[], object]]) -> None:
    """Time them in turns, and print each one's ratios to the first."""
    # What comes and goes once, as activations do, keeps glibc from returning every buffer to the system.
    torch.ones(ACTIVATION, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM + ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
            time.sleep(0.02)
    base, *_ = seconds.values()
    for name, found in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(found[WARM:], base[WARM:], strict=True)]
        low, middle, high = quantiles(ratios)
        print(f"{name}: {middle:.2f} ({low:.2f} – {high:.2f})")


if __name__ == "__main__":
    main()
