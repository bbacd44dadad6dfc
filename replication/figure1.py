"""Figure 1: training with LoRA is training with randomly projected gradients.

    python -m replication.figure1

A network of one hidden layer, 768 → 768 → 10, is trained by SGD on Fashion-MNIST. Its first layer W, of gradient G, is
trained in five ways; the output layer is always trained by SGD. A is r × 768 with elements of N(0, 1/r), so that
E[AᵀA] = I.

* *LoRA*: W₀ + BA with B = 0 at the start; B and A are trained.
* *LoRA(B)*: the same with A frozen.
* *RP*: W ← W − η G AᵀA, a fixed random projection.
* *RRP*: the same with A resampled in every step.
* *SGD*: W ← W − η G.

All of it is in float64, so that differences are those of the methods and not of rounding.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from benchmarks import harness
from floragrad._extras import require
from floragrad.cli.train.tasks.images import FASHION_MNIST, read_idx

WIDTH: Final = 768
RANK: Final = 8
LR: Final = 0.01
BATCH: Final = 64
SPANS: Final = 40
"""Points of a loss curve."""
METHODS: Final = ("LoRA", "LoRA(B)", "RP", "RRP", "SGD")

Examples = tuple[Tensor, Tensor]
"""Inputs (count, WIDTH) and classes (count,)."""


@dataclass
class Curve:
    """Result of one method with one seed.

    Attributes:
        losses: Mean training loss of each span of steps, in nats.
        changes: W − W₀ after each power of four steps.
        test_loss: Mean cross-entropy on the test images, in nats.
        accuracy: Share of the test images whose class is found.
    """

    losses: list[float] = field(default_factory=list)
    changes: dict[int, Tensor] = field(default_factory=dict)
    test_loss: float = 0.0
    accuracy: float = 0.0


def fashion_mnist(part: str) -> Examples:
    """Return standardised pixels of all but the four 2 × 2 corners, which leaves 768, and the classes.

    Args:
        part: ``"train"`` or ``"t10k"``.
    """
    pixels, labels = (
        torch.from_numpy(read_idx(FASHION_MNIST / f"{part}-{name}-ubyte.gz").copy())
        for name in ("images-idx3", "labels-idx1")
    )
    is_edge = torch.tensor([2 <= i < 26 for i in range(28)]).logical_not()
    values = pixels[:, ~(is_edge[:, None] & is_edge)].double() / 255
    return (values - values.mean()) / values.std(), labels.long()


def train(method: str, examples: Examples, test: Examples, seed: int, steps: int) -> Curve:
    """Train with one of :data:`METHODS`; the start, the batches and the first A follow from the seed alone."""
    generator, order, resampling = (torch.Generator().manual_seed(3 * seed + stream) for stream in range(3))
    start = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) * WIDTH**-0.5
    head = nn.Parameter(torch.randn(10, WIDTH, generator=generator, dtype=torch.float64) * WIDTH**-0.5)
    projection = _projection(generator)
    weight, a, b = (nn.Parameter(each) for each in (start.clone(), projection.clone(), start.new_zeros(WIDTH, RANK)))
    trained = {"LoRA": [a, b], "LoRA(B)": [b]}.get(method)
    optimizer = torch.optim.SGD([head, *(trained or [weight])], lr=LR)

    def logits(inputs: Tensor) -> Tensor:
        return relu(inputs @ (start + b @ a if trained else weight).T) @ head.T

    curve, recent = Curve(), []
    for step in range(1, steps + 1):
        batch = torch.randint(len(examples[0]), (BATCH,), generator=order)
        loss = cross_entropy(logits(examples[0][batch]), examples[1][batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if method in ("RP", "RRP"):
            if method == "RRP" and step > 1:
                projection = _projection(resampling)
            assert weight.grad is not None
            weight.grad = weight.grad @ projection.T @ projection
        optimizer.step()
        recent.append(loss.item())
        if step % max(steps // SPANS, 1) == 0:
            curve.losses.append(mean(recent))
            recent.clear()
        if step in checkpoints(steps):
            curve.changes[step] = (start + b @ a if trained else weight).detach() - start
    with torch.no_grad():
        found = logits(test[0])
    curve.test_loss = cross_entropy(found, test[1]).item()
    curve.accuracy = (found.argmax(1) == test[1]).double().mean().item()
    return curve


def _projection(generator: torch.Generator) -> Tensor:
    return torch.randn(RANK, WIDTH, generator=generator, dtype=torch.float64) * RANK**-0.5


def checkpoints(steps: int) -> list[int]:
    """Return the powers of four up to a number of steps."""
    return [4**i for i in range(steps.bit_length()) if 4**i <= steps]


def rank(change: Tensor) -> int:
    """Count the singular values above what rounding explains: 768 · 2⁻⁵² of the largest, which W adds to the change."""
    singular = torch.linalg.svdvals(change)
    return int((singular > max(singular[0].item(), 1.0) * WIDTH * 2**-52).sum())


def distance(change: Tensor, reference: Tensor) -> float:
    """Return ‖change − reference‖ / ‖reference‖."""
    return float((change - reference).norm() / reference.norm())


def page(curves: dict[str, list[Curve]], steps: int) -> list[str]:
    """Return the tables in Markdown."""
    marks = checkpoints(steps)
    seeds = len(curves["SGD"])
    results = [
        (
            name,
            _spread([c.losses[-1] for c in found]),
            _spread([c.test_loss for c in found]),
            _spread([c.accuracy for c in found]),
        )
        for name, found in curves.items()
    ]
    ranks = [
        (name, *(_range([rank(curve.changes[mark]) for curve in found]) for mark in marks))
        for name, found in curves.items()
    ]
    distances = [
        (f"{name} from {other}", *(_distances(curves[name], curves[other], mark) for mark in marks))
        for name, other in (("LoRA(B)", "RP"), ("LoRA", "RP"), ("RRP", "SGD"), ("RP", "SGD"))
    ]
    heads = [f"step {mark}" for mark in marks]
    return [
        "# Figure 1: LoRA is a random projection",
        "",
        (__doc__ or "").partition("replication.figure1\n")[2].strip(),
        "",
        f"r = {RANK}, η = {LR}, {steps} steps of {BATCH} images, {seeds} seeds; mean ± standard deviation.",
        "",
        "![loss curves](figure1.png)",
        "",
        *harness.table(("method", "training loss, last span", "test loss", "test accuracy"), results),
        "",
        "Rank of W − W₀ (least – most over the seeds):",
        "",
        *harness.table(("method", *heads), ranks),
        "",
        "Distance of W − W₀ between methods, over the norm of the second one's:",
        "",
        *harness.table(("methods", *heads), distances),
        "",
        *harness.environment(("torch", "floragrad")),
    ]


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)} – {max(values)}"


def _distances(one: Sequence[Curve], other: Sequence[Curve], mark: int) -> str:
    return f"{mean(distance(a.changes[mark], b.changes[mark]) for a, b in zip(one, other, strict=True)):.1e}"


def draw(curves: dict[str, list[Curve]], steps: int, path: str) -> None:
    """Draw the mean training loss of each method over the steps, with the range over seeds shaded."""
    figure = require("matplotlib.figure", "train")
    drawing = figure.Figure(figsize=(9, 5), layout="constrained")
    axes = drawing.subplots()
    span = max(steps // SPANS, 1)
    for name, found in curves.items():
        losses = [[curve.losses[i] for curve in found] for i in range(len(found[0].losses))]
        at = [span * (i + 1) for i in range(len(losses))]
        (line,) = axes.plot(at, [mean(each) for each in losses], label=name, linestyle="--" if name == "RP" else "-")
        axes.fill_between(
            at, [min(each) for each in losses], [max(each) for each in losses], color=line.get_color(), alpha=0.2
        )
    axes.set(xlabel="step", ylabel="training loss, nats", yscale="log")
    axes.legend()
    drawing.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with every method and seed, and write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=harness.ROOT / "replication" / "results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    examples, test = fashion_mnist("train"), fashion_mnist("t10k")
    curves = {name: [train(name, examples, test, seed, given.steps) for seed in given.seeds] for name in METHODS}
    harness.publish(given, "figure1", page(curves, given.steps))
    draw(curves, given.steps, str(given.out / "figure1.png"))


if __name__ == "__main__":
    main()
