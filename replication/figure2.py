"""Figure 2: memory of training by category, over four iterations.

    python -m replication.figure2

Four ways to train one model, each iteration of two micro-batches and an update:

* *exact*: gradients are added up in ``.grad``; Hugging Face's Adafactor with momentum updates every weight.
* *LoRA*: the same of peft's adapters alone.
* *Flora*: momentum and accumulated gradients are compressed, with the default options of ``Flora`` and
  ``GradientAccumulator``: a projection and int8 for the momentum, int4 for the gradients.
* *Flora, layer by layer*: activations are recomputed block by block, and each tensor is updated inside the last
  backward pass, as in LOMO.

Measured: models with random weights are trained on the bytes of a Python file, in float32, and a dispatch mode counts
every storage from its allocation until it is freed. A new projection is drawn in every update, which needs the most
temporaries. What Adafactor keeps is a temporary until the first update, which allocates it, has ended. Predicted: the
same by ``floragrad plan``, which allocates nothing.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from benchmarks import harness
from floragrad import GradientAccumulator
from floragrad.cli.peers import state_tensors
from floragrad.cli.plan.engine import Planner, row_of
from floragrad.cli.plan.models import PlannedModel, find_model, recompute_activations
from floragrad.cli.plan.optimizers import Row
from floragrad.cli.plan.picture import COLOURS
from floragrad.cli.plan.result import CATEGORIES, LASTING, OptimizerPlan, PlanSettings
from floragrad.cli.plan.trace import MAX_NORM, Moments, Trace
from floragrad.cli.plan.tracker import MemoryTracker
from floragrad.cli.plan.verdict import WORDS

SETTINGS: Final = {
    "exact": (Row("adafactor"), False),
    "LoRA": (Row("adafactor", lora=True), False),
    "Flora": (Row(clip=True), False),
    "Flora, layer by layer": (Row(clip=False), True),
}
"""What is trained by which optimizer, and whether activations are recomputed."""
MEASURED: Final = ("t5-small", "gpt2")
PREDICTED: Final = ("t5-3b", "mistral-7b")
PREDICTED_SEQUENCE: Final = 1024
"""Tokens of the micro-batches of models that are only predicted."""
POINTS: Final = 60
"""Of an iteration in the picture, about a pixel each: the highest moment of those that fall together."""
SHOWN: Final = tuple(name for name in CATEGORIES if name != "buckets")
"""Categories of one process."""


@dataclass(frozen=True)
class Measured:
    """Bytes of training that was run.

    Attributes:
        iterations: Moments of each iteration.
        row: Its bytes by category, as a plan has them.
    """

    iterations: tuple[Moments, ...]
    row: OptimizerPlan


def measure(
    subject: PlannedModel, row: Row, settings: PlanSettings, batches: Iterator[dict[str, Tensor]], steps: int = 2
) -> Measured:
    """Train on real tensors, counted by the planner's tracker.

    Args:
        subject: The model.
        row: What is trained, and by which optimizer.
        settings: The step.
        batches: Micro-batches, as keyword arguments of the model.
        steps: Iterations; the first one allocates the optimizer's state.
    """
    row.load()
    model = row.adapted(subject.build(getattr(torch, settings.dtype)), settings)
    if settings.checkpointing:
        recompute_activations(model)
    memory = MemoryTracker()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        memory.hold(tensor, "parameters", name)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}

    def gradient_came(name: str, param: Tensor) -> None:
        assert param.grad is not None
        memory.hold(param.grad, "gradients", name)
        memory.phase(f"fold of {name}", "temporaries")

    def gradient_went(_: Tensor) -> None:
        memory.phase("backward", "activations", follow=True)

    def hold_state(optimizer: Optimizer) -> None:
        for tensor in state_tensors(optimizer):
            memory.hold(tensor, "optimizer_state")

    iterations = []
    with memory, ExitStack() as stack:
        optimizer: Any = row.flora(model, settings, kappa=1) if row.peer is None else row.optimizer(model, settings)
        hold_state(optimizer)
        # Hooks of a parameter run in the order of their registration: the accumulator's between these two.
        for name, param in trained.items():
            param.register_post_accumulate_grad_hook(partial(gradient_came, name))  # type: ignore[no-untyped-call]
        accumulator = None
        if row.clip is not None:
            with memory.during("sketches", "accumulation"):
                accumulator = GradientAccumulator(optimizer, settings.accumulate, clip=row.clip)
            stack.callback(accumulator.close)
        for param in trained.values():
            param.register_post_accumulate_grad_hook(gradient_went)  # type: ignore[no-untyped-call]
        memory.cut()
        for _ in range(steps):
            for _ in range(settings.accumulate):
                memory.phase("forward", "activations", follow=True)
                batch = next(batches)
                loss = model(**batch).loss
                memory.phase("backward", "activations", follow=True)
                accumulator.backward(loss) if accumulator else (loss / settings.accumulate).backward()
                del batch, loss
            memory.phase("update", "temporaries", follow=True)
            if accumulator is None:
                torch.nn.utils.clip_grad_norm_(list(trained.values()), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
            else:
                if row.clip:
                    accumulator.clip_grad_norm_(MAX_NORM)
                accumulator.step()
            hold_state(optimizer)
            iterations.append(memory.cut())
        first, *later = iterations
        trace = Trace(first, sum(later, ()), tuple(memory.bytes_of(category) for category in LASTING))
    return Measured(tuple(iterations), row_of(trace))


def text(settings: PlanSettings) -> Iterator[dict[str, Tensor]]:
    """Yield micro-batches of the source of ``argparse``: every byte is a token, and its own label."""
    source = Path(argparse.__file__).read_bytes()
    size = settings.batch * settings.sequence
    for at in range(0, len(source) - size, size):
        tokens = [list(source[begin : begin + settings.sequence]) for begin in range(at, at + size, settings.sequence)]
        yield {"input_ids": torch.tensor(tokens), "labels": torch.tensor(tokens)}


@dataclass(frozen=True)
class Profile:
    """One model in every setting of :data:`SETTINGS`.

    Attributes:
        settings: The step.
        predicted: Planned bytes.
        measured: Bytes of training; empty where none was run.
    """

    settings: PlanSettings
    predicted: Mapping[str, OptimizerPlan]
    measured: Mapping[str, Measured]

    def difference(self, name: str) -> int:
        """Return the largest difference of a category at the peak between prediction and measurement of a setting."""
        found = self.measured[name].row.at_peak
        return max(abs(nbytes - found[category]) for category, nbytes in self.predicted[name].at_peak.items())


def profile(subject: PlannedModel, settings: PlanSettings, steps: int = 0) -> Profile:
    """Predict every setting, with the rank that ``floragrad plan`` would choose, and measure some iterations of it."""
    settings = replace(settings, rank=subject.rank(None, sketched=True))
    predicted, measured = {}, {}
    for name, (row, checkpointing) in SETTINGS.items():
        own = replace(settings, checkpointing=checkpointing)
        predicted[name] = Planner(subject, own).row(row)
        if steps:
            measured[name] = measure(subject, row, own, text(own), steps)
    return Profile(settings, predicted, measured)


def page(profiles: Mapping[str, Profile]) -> list[str]:
    """Return the tables in Markdown."""
    lines = [
        "# Figure 2: memory by category",
        "",
        (__doc__ or "").partition("replication.figure2\n")[2].strip(),
        "",
        "![live bytes over the iterations](figure2.png)",
        "",
        "Bytes of each category when all of them together are most, in MB.",
        "",
    ]
    for model, found in profiles.items():
        step, note = found.settings, "Predicted only: nothing was allocated."
        if found.measured:
            most = max(map(found.difference, found.measured))
            note = f"Prediction and measurement differ by at most {most} bytes in any category."
        rows = [
            (name, kind, *(f"{row.at_peak[category] / 1e6:,.1f}" for category in SHOWN), f"{row.peak / 1e6:,.1f}")
            for name, predicted in found.predicted.items()
            for kind, row in (
                *([("measured", found.measured[name].row)] if found.measured else []),
                ("predicted", predicted),
            )
        ]
        lines += [
            f"## {model}",
            "",
            f"Micro-batches of {step.batch} × {step.sequence} tokens, {step.dtype}, rank {step.rank}. {note}",
            "",
            *harness.table(("setting", "", *(WORDS[category] for category in SHOWN), "peak"), rows),
            "",
        ]
    return [*lines, *harness.environment(("torch", "transformers", "peft", "floragrad"))]


def draw(profiles: Mapping[str, Profile], path: Path) -> None:
    """Draw the measured models: a row of panels for each, a panel for each setting, all on one scale."""
    figure = Figure(figsize=(13, 3 * len(profiles) + 0.5), layout="constrained")
    panels = figure.subplots(len(profiles), len(SETTINGS), sharex=True, sharey=True, squeeze=False)
    for line, (model, found) in zip(panels, profiles.items(), strict=True):
        line[0].set_ylabel(f"{model}: live bytes (MB)")
        for panel, (name, measured) in zip(line, found.measured.items(), strict=True):
            points = [
                (number + at / len(moments), max((each.peak for each in moments[at : at + width]), key=sum))
                for number, moments in enumerate(measured.iterations)
                for width in [-(-len(moments) // POINTS)]
                for at in range(0, len(moments), width)
            ]
            panel.stackplot(
                [at for at, _ in points],
                [[nbytes[CATEGORIES.index(category)] / 1e6 for _, nbytes in points] for category in SHOWN],
                labels=[WORDS[category] for category in SHOWN],
                colors=[COLOURS[category] for category in SHOWN],
                linewidth=0,
            )
            panel.set_title(f"{name}: {measured.row.peak / 1e6:,.0f} MB", loc="left", fontsize=10)
            panel.set_xlim(0, len(measured.iterations))
            panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("iterations")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict and measure every model in every setting, and write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MEASURED, help="presets or files of floragrad plan, measured")
    parser.add_argument("--predict", nargs="*", default=PREDICTED, help="the same, predicted only")
    parser.add_argument("--steps", type=int, default=4, help="iterations, at least 2 (default: %(default)s)")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a measured micro-batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=harness.ROOT / "replication" / "results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    step = PlanSettings(accumulate=2, sequence=given.sequence)
    longer = replace(step, sequence=PREDICTED_SEQUENCE)
    measured = {name: profile(find_model(name), step, given.steps) for name in given.models}
    predicted = {name: profile(find_model(name), longer) for name in given.predict}
    harness.publish(given, "figure2", page({**measured, **predicted}))
    draw(measured, given.out / "figure2.png")


if __name__ == "__main__":
    main()
