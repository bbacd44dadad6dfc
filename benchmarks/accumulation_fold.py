"""What folding a gradient costs: its noise in a window, and its time against the products of a backward pass.

    python -m benchmarks.accumulation_fold

Gradients that have nothing in common (independent normal numbers), a layer of 768 x 3072, one thread. Times are
medians over interleaved rounds, as ratios.
"""

import time
from statistics import median

import torch

from floragrad.policy import StateDtype, plan_accumulator
from floragrad.torch.accumulation.sketch import GradientSketch

SHAPE = (768, 3072)
MICRO_BATCHES = 16
TOKENS = 256
ROUNDS = 15
KINDS: tuple[tuple[StateDtype, int], ...] = (("int4", 1), ("int8", 1), ("float32", 2))


def sketch(state_dtype: StateDtype, ratio: int) -> GradientSketch:
    plan = plan_accumulator(SHAPE, state_dtype=state_dtype, ratio=ratio)
    return GradientSketch(plan, "sign", 0, 0, torch.device("cpu"))


def noise(state_dtype: StateDtype) -> float:
    """The squared error of a window's decoded sum over the sum's square, for each micro-batch."""
    window = sketch(state_dtype, 1)
    total = torch.zeros(SHAPE)
    for _ in range(MICRO_BATCHES):
        grad = torch.randn(SHAPE)
        total += grad / MICRO_BATCHES
        window.add(grad, 1 / MICRO_BATCHES, 0, measure_noise=False)
    decoded = torch.empty(SHAPE)
    window.decode_into(decoded, 0, 0.0, 1.0)
    return float((decoded - total).square().sum() / total.square().sum()) / MICRO_BATCHES


def fold_times() -> dict[str, float]:
    """Median seconds of one fold of each kind, and of one matrix product of the layer's backward pass."""
    windows = {f"{dtype}, ratio {ratio}": sketch(dtype, ratio) for dtype, ratio in KINDS}
    grad, inputs, outputs = torch.randn(SHAPE), torch.randn(TOKENS, SHAPE[1]), torch.randn(TOKENS, SHAPE[0])
    seconds: dict[str, list[float]] = {name: [] for name in [*windows, "product"]}
    for _ in range(ROUNDS):
        for name, window in windows.items():
            started = time.perf_counter()
            window.add(grad, 1.0, 0, measure_noise=True)
            seconds[name].append(time.perf_counter() - started)
        started = time.perf_counter()
        outputs.T @ inputs
        seconds["product"].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for dtype in ("int4", "int8"):
        print(f"{dtype}: noise {noise(dtype):.2g} of the window's square for each micro-batch")
    times = fold_times()
    for name in list(times)[:-1]:
        print(f"{name}: a fold takes {times[name] / times['product']:.2f} products with {TOKENS} tokens")


if __name__ == "__main__":
    main()
