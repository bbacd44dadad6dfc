"""What folding a gradient costs: its noise in a window, and its time against what it replaces, ``.grad``'s own sum.

    python -m benchmarks.accumulation_fold
    FLORAGRAD_KERNELS=eager python -m benchmarks.accumulation_fold

Gradients that have nothing in common (independent normal numbers), the layers of GPT-2 small in turns, so that no
buffer stays in a cache from one round to the next. Times are medians over interleaved rounds of each round's ratio to
the plain sum, with quartiles; the second command is without the native kernels.
"""

import time
from statistics import quantiles

import torch

from floragrad.policy import StateDtype, plan_accumulator
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.backends.cpu.library import absence

SHAPE = (768, 3072)
LAYERS = ((768, 2304), (768, 768), (768, 3072), (3072, 768)) * 6
MICRO_BATCHES = 16
ROUNDS = 15
KINDS: tuple[tuple[StateDtype, int], ...] = (("int4", 1), ("int8", 1), ("int4", 2), ("int8", 2), ("float32", 2))


def sketch(state_dtype: StateDtype, ratio: int, shape: tuple[int, int] = SHAPE) -> GradientSketch:
    plan = plan_accumulator(shape, state_dtype=state_dtype, ratio=ratio, kind="matrix")
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


def fold_times() -> dict[str, tuple[float, float, float]]:
    """Quartiles over rounds of a round's ratio to the plain sum, of folding every layer's gradient."""
    grads = [torch.randn(shape) for shape in LAYERS]
    sums = [torch.zeros(shape) for shape in LAYERS]
    windows = {f"{dtype}, ratio {ratio}": [sketch(dtype, ratio, shape) for shape in LAYERS] for dtype, ratio in KINDS}
    ratios: dict[str, list[float]] = {name: [] for name in windows}
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        for total, grad in zip(sums, grads, strict=True):
            total += grad
        plain = time.perf_counter() - started
        for name, sketches in windows.items():
            started = time.perf_counter()
            for window, grad in zip(sketches, grads, strict=True):
                window.add(grad, 1.0, 0, measure_noise=False)
            ratios[name].append((time.perf_counter() - started) / plain)
    return {name: tuple(quantiles(found[1:])) for name, found in ratios.items()}  # type: ignore[misc]


def main() -> None:
    torch.manual_seed(0)
    for dtype in ("int4", "int8"):
        print(f"{dtype}: noise {noise(dtype):.2g} of the window's square for each micro-batch")
    print("native kernels:", absence() or "yes")
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for name, (low, middle, high) in fold_times().items():
            print(f"{name}, {threads} threads: a fold takes {middle:.2f} plain sums ({low:.2f} – {high:.2f})")


if __name__ == "__main__":
    main()
