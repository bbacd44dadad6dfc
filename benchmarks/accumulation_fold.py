"""Time the fold of a gradient into a sketch beside the ``.grad`` sum that it replaces, and measure a window's noise.

    python -m benchmarks.accumulation_fold
    FLORAGRAD_KERNELS=eager python -m benchmarks.accumulation_fold --out runs/eager

Gradients are independent normal numbers of the shapes of GPT-2 small's layers. The second command uses no kernels.
"""

from collections.abc import Sequence

import torch

from benchmarks import harness
from benchmarks.harness import Timed
from floragrad.policy import StateDtype, plan_accumulator
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.backends.cpu.library import absence

LAYERS = ((768, 2304), (768, 768), (768, 3072), (3072, 768)) * 6
MICRO_BATCHES = 16
KINDS: tuple[tuple[StateDtype, int], ...] = (("int4", 1), ("int8", 1), ("int4", 2), ("int8", 2), ("float32", 2))
Shape = tuple[int, int]


def sketch(state_dtype: StateDtype, ratio: int, shape: Shape) -> GradientSketch:
    plan = plan_accumulator(shape, state_dtype=state_dtype, ratio=ratio, kind="matrix")
    return GradientSketch(plan, "sign", 0, 0, torch.device("cpu"))


def noise(state_dtype: StateDtype, shape: Shape = (768, 3072)) -> float:
    """Return the squared error of a window's decoded sum over the sum's square, divided by the micro-batches."""
    window, total, decoded = sketch(state_dtype, 1, shape), torch.zeros(shape), torch.empty(shape)
    for _ in range(MICRO_BATCHES):
        grad = torch.randn(shape)
        total += grad / MICRO_BATCHES
        window.add(grad, 1 / MICRO_BATCHES, 0, measure_noise=False)
    window.decode_into(decoded, 0, 0.0, 1.0)
    return float((decoded - total).square().sum() / total.square().sum()) / MICRO_BATCHES


def time_folds(shapes: Sequence[Shape], rounds: int) -> list[tuple[str, str]]:
    """Time the folds of all gradients in turns with their sums; return names and ratios."""
    grads = [torch.randn(shape) for shape in shapes]
    sums = [torch.zeros(shape) for shape in shapes]
    rows = {"sum": Timed(lambda: [total.add_(grad) for total, grad in zip(sums, grads, strict=True)])}
    for dtype, ratio in KINDS:
        windows = [sketch(dtype, ratio, shape) for shape in shapes]

        def fold(windows: list[GradientSketch] = windows) -> None:
            for window, grad in zip(windows, grads, strict=True):
                window.add(grad, 1.0, 0, measure_noise=False)

        rows[f"{dtype}, ρ = {ratio}"] = Timed(fold)
    harness.interleave(rows.values(), rounds)
    return [(name, str(harness.ratio(row.seconds, rows["sum"].seconds))) for name, row in rows.items()]


def main(arguments: Sequence[str] | None = None, shapes: Sequence[Shape] = LAYERS) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="measured folds of every gradient (default: 15)")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    page = ["# Folding a gradient", "", "Time over that of the `.grad` sum; medians over rounds, and quartiles.", ""]
    columns = {}
    for threads in sorted({1, harness.cores()}):
        torch.set_num_threads(threads)
        columns[f"threads: {threads}"] = time_folds(shapes, given.rounds)
    rows = [(cells[0][0], *(cell for _, cell in cells)) for cells in zip(*columns.values(), strict=True)]
    page += [*harness.table(("fold", *columns), rows), ""]
    noises = ", ".join(f"{noise(dtype):.2g} in {dtype}" for dtype in ("int4", "int8"))
    page += [f"Noise of a window, over its square, for each micro-batch: {noises}.", ""]
    page += [f"- native kernels: {absence() or 'yes'}", *harness.environment(("floragrad", "torch"))]
    harness.publish(given, "accumulation_fold", page)
    print("\n".join(page))


if __name__ == "__main__":
    main()
