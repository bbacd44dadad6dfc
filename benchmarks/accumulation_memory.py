"""Track live bytes over one window of gradient accumulation, by category: exact next to compressed.

    python -m benchmarks.accumulation_memory

One window of a small Llama with exact accumulation (``loss / steps`` into ``.grad``), and one with
:class:`floragrad.GradientAccumulator`. A dispatch mode sees every storage that is allocated and freed. Both are drawn
to ``docs/accumulation_memory.png`` (Figure 2 of the paper, for a whole window), and the peaks are printed.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from floragrad import Flora, GradientAccumulator, param_groups
from floragrad.cli.plan.tracker import MemoryTracker

CATEGORIES = ("parameters", "optimizer state", "sketches", "gradients", "temporaries", "activations")
COLOURS = ("#4c566a", "#5e81ac", "#a3be8c", "#bf616a", "#d08770", "#d8dee9")


class Timeline(MemoryTracker):
    """Live bytes by category after every operation.

    Storages made inside :meth:`stage` have its category. Elsewhere they are activations; but in a backward pass or a
    step a storage of a parameter's size is a gradient, and others of a step or of a gradient's hook are temporaries.

    Args:
        sizes: Bytes of each parameter, alive from the beginning. No activation may have one of these sizes.
    """

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.samples: list[tuple[int, ...]] = []
        self._sizes = set(sizes)
        self._stage = ""
        self._bytes = dict.fromkeys(CATEGORIES, 0) | {"parameters": sum(sizes)}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Give all storages made inside this category, or those of a ``"step"``."""
        before, self._stage = self._stage, name
        yield
        self._stage = before

    def peak_of(self, *categories: str) -> int:
        """Return the most bytes that these categories had together at one time."""
        at = [CATEGORIES.index(category) for category in categories]
        return max(sum(sample[i] for i in at) for sample in self.samples)

    def _count(self, storage: torch.UntypedStorage) -> None:
        before = self.live
        super()._count(storage)
        size = self.live - before
        if size:
            category = self._category_of(size)
            self._bytes[category] += size
            weakref.finalize(storage, self._forget, category, size)
            self.samples.append(tuple(self._bytes.values()))

    def _forget(self, category: str, size: int) -> None:
        self._bytes[category] -= size
        self.samples.append(tuple(self._bytes.values()))

    def _category_of(self, size: int) -> str:
        if self._stage in CATEGORIES:
            return self._stage
        node = torch._C._current_autograd_node()
        if node is None and self._stage != "step":
            return "activations"
        if size in self._sizes:
            return "gradients"
        ours = self._stage == "step" or "AccumulateGrad" in type(node).__name__ + str(node)
        return "temporaries" if ours else "activations"


@dataclass(frozen=True)
class Job:
    """One window of a Llama's training.

    Attributes:
        hidden: Width.
        layers: Depth.
        vocabulary: Size of the vocabulary.
        steps: Micro-batches of the window.
        tokens: Tokens of a micro-batch.
        options: Options of the accumulator; None accumulates exactly.
    """

    hidden: int = 512
    layers: int = 12
    vocabulary: int = 4096
    steps: int = 4
    tokens: int = 96
    options: dict[str, Any] | None = None

    def model(self) -> torch.nn.Module:
        """Make the Llama, with random weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 43 // 16,
            num_hidden_layers=self.layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=self.tokens,
            use_cache=False,
        )
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Measured:
    """The timeline of a window, and predicted bytes.

    Attributes:
        timeline: Of the whole window.
        sketch_bytes: Of the accumulator's report.
        gradient_bytes: Of all gradients in float32.
        largest: Of the largest gradient in float32.
    """

    timeline: Timeline
    sketch_bytes: int
    gradient_bytes: int
    largest: int


def measure(job: Job) -> Measured:
    """Run one window and record it."""
    model = job.model()
    sizes = [4 * param.numel() for param in model.parameters()]
    timeline, accumulator = Timeline(sizes), None
    batches = torch.randint(0, job.vocabulary, (job.steps, 1, job.tokens))
    with timeline:
        with timeline.stage("optimizer state"):
            optimizer = Flora(param_groups(model, lr=1e-3), rank=job.hidden // 6)
        if job.options is not None:
            with timeline.stage("sketches"):
                accumulator = GradientAccumulator(optimizer, job.steps, **job.options)
        for tokens in batches:
            loss = model(input_ids=tokens, labels=tokens).loss
            if accumulator is None:
                (loss / job.steps).backward()
            else:
                accumulator.backward(loss)
            del loss
        with timeline.stage("step"):
            if accumulator is None:
                optimizer.step()
                optimizer.zero_grad()
            else:
                accumulator.step()
    sketch_bytes = 0
    if accumulator is not None:
        sketch_bytes = accumulator.report().state_bytes
        accumulator.close()
    return Measured(timeline, sketch_bytes, sum(sizes), max(sizes))


def draw(pairs: dict[str, Measured], path: Path) -> None:
    """Draw both windows side by side, stacked by category."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, len(pairs), sharey=True)
    for axis, (title, measured) in zip(axes, pairs.items(), strict=True):
        samples = measured.timeline.samples
        stride = max(1, len(samples) // 3000)
        # The largest of each stretch, so that no peak falls between two points.
        points = [max(samples[i : i + stride], key=sum) for i in range(0, len(samples), stride)]
        layers = [[point[c] / 1e6 for point in points] for c in range(len(CATEGORIES))]
        axis.stackplot(range(len(points)), layers, labels=CATEGORIES, colors=COLOURS, linewidth=0)
        axis.set(title=f"{title}: peak {max(map(sum, samples)) / 1e6:.0f} MB", xlim=(0, len(points) - 1), xticks=[])
        axis.set_xlabel("one window: micro-batches, then the update")
    axes[0].set_ylabel("live bytes (MB)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None, job: Job = Job()) -> None:
    parser = harness.parser(__doc__)
    parser.set_defaults(out=harness.ROOT / "docs")
    given = parser.parse_args(arguments)
    pairs = {"exact": measure(job), "GradientAccumulator": measure(replace(job, options={}))}
    rows = [
        (title, *(f"{measured.timeline.peak_of(name) / 1e6:.1f} MB" for name in CATEGORIES))
        for title, measured in pairs.items()
    ]
    draw(pairs, given.out / "accumulation_memory.png")
    print("\n".join(harness.table(("peak of each", *CATEGORIES), rows)))


if __name__ == "__main__":
    main()
