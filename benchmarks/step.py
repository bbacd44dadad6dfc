"""Time an optimizer step of Flora and its peers as a ratio to fused AdamW; report state and temporary bytes.

    make bench
    python -m benchmarks.step --runs layers --rounds 5 --out runs/step

All optimizers of a run live in one process, each with parameters and gradients of its own, and step in turns (see
:mod:`benchmarks.harness`): processes that are timed against each other have different pages of memory, which alone
moved ratios by half on a shared machine. A round goes through several gigabytes, so that no tensor is still in a cache
at the next turn of its optimizer. The page is written after every run; leave the machine alone meanwhile.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from math import prod
from typing import Any, Final
from unittest.mock import patch

import psutil
import torch
from torch import nn

from benchmarks import harness, peers
from benchmarks.harness import Ratio, Timed
from benchmarks.peers import COPY, FLORA_OPT, FUSED, HF_ADAFACTOR, LR, MUON, PEERS, TORCH_ADAFACTOR, Group, Make
from floragrad import Flora, param_groups
from floragrad._text import format_bytes
from floragrad.cli.plan.models import find_model
from floragrad.cli.plan.tracker import MemoryTracker
from floragrad.torch import backends

LAYERS: Final = "layers"
"""GPT-2 small without its embeddings."""
WIDTH: Final = 768
KAPPA: Final = 100
"""The steps over which an adaptive resample step is amortised."""


class Eager:
    """Flora stepped by PyTorch's operations, as with ``FLORAGRAD_KERNELS=eager``, which is read once a process."""

    def __init__(self, optimizer: Flora) -> None:
        self.optimizer, self.state = optimizer, optimizer.state

    def step(self) -> None:
        """Step without kernels."""
        with patch.object(backends, "BACKENDS", backends.BACKENDS[-1:]):
            self.optimizer.step()


def _flora(eager: bool = False, **options: Any) -> Make:
    def make(groups: list[Group]) -> list[Any]:
        made = Flora(groups, lr=LR, **options)
        return [Eager(made) if eager else made]

    return make


def ranked(rank: int) -> str:
    """Return the name of the row of a rank."""
    return f"Flora, int8, rank {rank}"


RANKS: Final = (16, 32, 64, 128, 256)
INT8: Final = "Flora, int8"
FLOAT32: Final = "Flora, float32"
EAGER: Final = "Flora, int8, eager"
ADAPTIVE: Final = "Flora, int8, adaptive"
OURS: Final[dict[str, Make]] = {
    INT8: _flora(),
    FLOAT32: _flora(state_dtype="float32"),
    "Flora, bfloat16": _flora(state_dtype="bfloat16"),
    "Flora, int4": _flora(state_dtype="int4"),
    ADAPTIVE: _flora(projection="adaptive", kappa=KAPPA),
    "Flora, no momentum": _flora(beta1=None),
    EAGER: _flora(eager=True),
    "Flora, float32, eager": _flora(eager=True, state_dtype="float32"),
    **{ranked(rank): _flora(rank=rank) for rank in RANKS},
    f"{INT8}, resampling": _flora(kappa=1),
    f"{ADAPTIVE}, resampling": _flora(projection="adaptive", kappa=1),
}
"""Rank 128 where nothing else is said. Those that resample do so in every step."""
MAKES: Final[dict[str, Make]] = {**PEERS, **OURS}


@dataclass(frozen=True)
class Run:
    """Optimizers that are timed in the same rounds.

    Attributes:
        title: Its heading on the page.
        shapes: The model whose tensors are stepped, as :func:`specs` names it.
        rows: Optimizers, by their names in :data:`MAKES`; the reference is always there.
        dtype: Of parameters and gradients.
        threads: Of torch; None: all that were asked for.
        rounds: The most rounds to measure; rows that take many times the reference's time have few.
    """

    title: str
    shapes: str
    rows: Sequence[str]
    dtype: torch.dtype = torch.float32
    threads: int | None = None
    rounds: int = 15


GOALS_RUN: Final = "GPT-2 small's layers"
RESAMPLE_RUN: Final = "GPT-2 small's layers, steps that resample"
RANKS_RUN: Final = "GPT-2 small's layers, growth over the rank"
_MODELS = {"GPT-2 small": "gpt2", "T5 small": "t5-small", "Llama 60M": "llama-60m", "Llama 350M": "llama-350m"}
_DTYPES = (FLOAT32, "Flora, bfloat16", INT8, "Flora, int4", ranked(16), ranked(256), "Flora, no momentum")
_COMPARED = (COPY, TORCH_ADAFACTOR, HF_ADAFACTOR, FLORA_OPT)
RUNS: Final = (
    Run(GOALS_RUN, LAYERS, (*_COMPARED, *tuple(OURS)[:8])),
    Run(RESAMPLE_RUN, LAYERS, (INT8, f"{INT8}, resampling", ADAPTIVE, f"{ADAPTIVE}, resampling")),
    Run(RANKS_RUN, LAYERS, [ranked(rank) for rank in RANKS]),
    Run(
        "GPT-2 small's layers, peers",
        LAYERS,
        [name for name in PEERS if name not in (FUSED, MUON, *_COMPARED)],
        rounds=5,
    ),
    Run("GPT-2 small's layers, one thread", LAYERS, _DTYPES, threads=1),
    Run("GPT-2 small's layers, bfloat16 parameters", LAYERS, _DTYPES, torch.bfloat16),
    *(Run(f"GPT-2's layers, width {width}", f"{LAYERS} {width}", (INT8, FLOAT32)) for width in (256, 512, 1024)),
    *(Run(title, model, (INT8, FLOAT32, TORCH_ADAFACTOR)) for title, model in _MODELS.items()),
)
"""All that is measured, the goals first."""


@cache
def specs(shapes: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return kinds and shapes of the tensors of a model on the meta device, tied ones once.

    Args:
        shapes: A model of ``floragrad plan``, or ``"layers WIDTH"`` for the layers of GPT-2 with another width.
    """
    model, _, width = shapes.partition(" ")
    with torch.device("meta"):
        if model == LAYERS:
            from transformers import AutoConfig, GPT2LMHeadModel

            hidden = int(width or WIDTH)
            built = GPT2LMHeadModel(AutoConfig.for_model("gpt2", n_embd=hidden, n_head=hidden // 64)).transformer.h
        else:
            found = find_model(model)
            built = found.build(torch.float32)
    groups = param_groups(built, lr=LR)
    return [(group["kind"], tuple(param.shape)) for group in groups for _, param in group["params"]]


@dataclass
class Figures:
    """Measurements of one optimizer.

    Attributes:
        ratio: Of its seconds to the reference's.
        first: Seconds of the first step, which makes states.
        state: Bytes between steps.
        predicted: The same by Flora's report, which is made before the first step.
        temporaries: Bytes that a step allocates at its peak, seen by a dispatch mode; None where the step is compiled.
        error: Why figures are missing; empty where none are.
        seconds: Of its measured steps.
    """

    ratio: Ratio | None = None
    first: float | None = None
    state: int | None = None
    predicted: int | None = None
    temporaries: int | None = None
    error: str = ""
    seconds: list[float] = field(default_factory=list)


def _groups(shapes: str, dtype: torch.dtype) -> list[Group]:
    """Make parameter groups, with the same values for every optimizer."""
    generator = torch.Generator().manual_seed(0)
    by_kind: dict[str, list[nn.Parameter]] = {}
    for kind, shape in specs(shapes):
        values = torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
        by_kind.setdefault(kind, []).append(nn.Parameter(values))
    return [{"kind": kind, "params": params} for kind, params in by_kind.items()]


def prepare(name: str, run: Run) -> tuple[Figures, Timed]:
    """Make an optimizer, take two steps, and count the bytes that it holds and allocates.

    Raises:
        MemoryError: Parameters, gradients and two moments would not fit into the memory that is available.
    """
    needed = 4 * run.dtype.itemsize * sum(prod(shape) for _, shape in specs(run.shapes))
    available = psutil.virtual_memory().available
    if needed > available:
        raise MemoryError(f"may need {format_bytes(needed)}, {format_bytes(available)} are available")
    groups = _groups(run.shapes, run.dtype)
    gradients = {param: param.detach() * 0.05 for group in groups for param in group["params"]}
    optimizers = MAKES[name](groups)

    def give_gradients() -> None:  # flora-opt takes them away
        for param, gradient in gradients.items():
            param.grad = gradient

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    found = Figures()
    if name in OURS:
        found.predicted = sum(getattr(each, "optimizer", each).report().state_bytes for each in optimizers)
    first = Timed(step, give_gradients)
    harness.interleave([first], rounds=1, warm_up=0)
    if first.error:
        raise RuntimeError(first.error)
    found.first = first.seconds[0]
    if name != peers.TORCHAO:
        give_gradients()
        with MemoryTracker() as memory:
            step()
        found.temporaries = memory.peak
    found.state = peers.state_bytes(optimizers, [*gradients, *gradients.values()])
    return found, Timed(step, give_gradients)


def measure(run: Run, rounds: int, threads: int) -> dict[str, Figures]:
    """Time all optimizers of a run in turns."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc keeps the buffers of the run before
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    found: dict[str, Figures] = {}
    timed: dict[str, Timed] = {}
    torch.set_num_threads(run.threads or threads)
    for name in (FUSED, *run.rows):
        try:
            found[name], timed[name] = prepare(name, run)
        except Exception as error:  # noqa: PERF203  # a peer that fails must not end the others
            found[name] = Figures(error=harness.one_line(error))
    harness.interleave(timed.values(), min(rounds, run.rounds), warm_up=1)
    for name, row in timed.items():
        found[name].seconds, found[name].error = row.seconds, row.error
        found[name].ratio = harness.ratio(row.seconds, timed[FUSED].seconds) if FUSED in timed else None
    return found


Results = Mapping[str, Mapping[str, Figures]]
"""Figures by the titles of runs and the names of optimizers."""


@dataclass(frozen=True)
class Goal:
    """An upper bound of a figure.

    Attributes:
        text: The figure in words.
        bound: The largest value that meets the goal.
        value: The figure, from the results.
        digits: Digits that are shown.
    """

    text: str
    bound: float
    value: Callable[[Results], float]
    digits: int = 2

    def row(self, results: Results) -> tuple[str, str, str, str]:
        """Return the figure, the goal, the measured value and the verdict, in words."""
        shown = f"≤ {self.bound:.{self.digits}f}"
        try:
            value = self.value(results)
        except LookupError as error:
            return self.text, shown, "—", f"not measured: {error.args[0]}"
        return self.text, shown, f"{value:.{self.digits}f}", "met" if value <= self.bound else "not met"


def _figures(results: Results, run: str, name: str) -> Figures:
    if run not in results:
        raise LookupError(run)
    found = results[run].get(name, Figures())
    if found.ratio is None or found.temporaries is None:
        raise LookupError(f"{name}: {found.error}" if found.error else name)
    return found


def _over(name: str, *others: str, run: str = GOALS_RUN, amortised: int = 1) -> Callable[[Results], float]:
    """Return a step's time over the fastest of others, each as a ratio to the reference of the same rounds."""

    def value(results: Results) -> float:
        own, *rest = (_figures(results, run, each).ratio.median for each in (name, *others))  # type: ignore[union-attr]
        return 1 + (own / min(rest) - 1) / amortised

    return value


def _temporaries(name: str) -> Callable[[Results], float]:
    def value(results: Results) -> float:
        largest = 4 * max(prod(shape) for _, shape in specs(LAYERS))
        return (_figures(results, GOALS_RUN, name).temporaries or 0) / largest

    return value


def _mispredicted(results: Results) -> float:
    """Count the rows whose state is not of the predicted size."""
    found = [row for rows in results.values() for row in rows.values() if row.predicted is not None]
    if not found:
        raise LookupError("no row of Flora")
    return sum(row.predicted != row.state for row in found)


_RESAMPLE = partial(_over, f"{ADAPTIVE}, resampling", ADAPTIVE, run=RESAMPLE_RUN)
GOALS: Final = (
    Goal("step time against flora-opt with momentum", 0.10, _over(INT8, FLORA_OPT), 3),
    Goal(
        "step time against the faster of torch's and Hugging Face's Adafactor, theirs without momentum",
        0.3,
        _over(INT8, TORCH_ADAFACTOR, HF_ADAFACTOR),
    ),
    Goal("step time against fused AdamW", 1.2, _over(INT8, FUSED)),
    Goal("the same with float32 state", 1.0, _over(FLOAT32, FUSED)),
    Goal("step time at rank 256 over rank 16", 1.15, _over(ranked(256), ranked(16), run=RANKS_RUN)),
    Goal("step time against fused AdamW without the native kernels, eager", 3, _over(EAGER, FUSED)),
    Goal("peak temporary bytes of an eager step, in units of the largest tensor", 1, _temporaries(EAGER)),
    Goal("the same with the native kernels", 0.05, _temporaries(INT8)),
    Goal("resample step over ordinary step", 1.3, _over(f"{INT8}, resampling", INT8, run=RESAMPLE_RUN)),
    Goal('the same, projection="adaptive"', 3, _RESAMPLE()),
    Goal(f"the same, amortised over κ = {KAPPA}", 1.05, _RESAMPLE(amortised=KAPPA), 3),
    Goal("rows of Flora whose state differs from the predicted bytes", 0, _mispredicted, 0),
)
"""Of GPT-2 small's layers, float32 parameters, all threads, rank 128 and int8 state unless a goal says otherwise."""

ABOUT: Final = (
    "All optimizers of a table have parameters and gradients of their own in one process, and step in turns, in a new "
    f"order each round. *Ratio*: the median over rounds of its time to that of {FUSED}, with the quartiles. "
    "*First*: seconds of the first step, which makes states and compiles. *State*: bytes kept between steps, measured "
    "from the storages; *predicted* by `report()`. *Temporaries*: bytes that a step allocates on top at its peak, seen "
    "by a dispatch mode, and the same in units of the largest tensor in float32; buffers inside a kernel are not seen, "
    "nor is a compiled step. Rank 128 unless a row says otherwise."
)


def page(results: Results, rounds: int, threads: int) -> list[str]:
    """Write the page of results."""
    lines = ["# Step time", "", ABOUT, "", "## Goals", ""]
    lines += [f"GPT-2 small's layers, float32 parameters, threads: {threads}.", ""]
    lines += harness.table(("figure", "goal", "measured", "verdict"), [goal.row(results) for goal in GOALS])
    header = ("optimizer", "ratio", "quartiles", "ms", "first, s", "state", "predicted", "temporaries", "of largest")
    for run in (run for run in RUNS if run.title in results):
        sizes = [prod(shape) for _, shape in specs(run.shapes)]
        counts = f"{sum(sizes) / 1e6:.1f}M elements, {max(sizes) / 1e6:.2f}M in the largest tensor"
        dtype = str(run.dtype).removeprefix("torch.")
        lines += ["", f"## {run.title}", ""]
        lines += [f"{counts}; {dtype}; threads: {run.threads or threads}; {min(rounds, run.rounds)} rounds.", ""]
        rows = results[run.title].items()
        lines += harness.table(header, [(name, *_cells(row, 4 * max(sizes))) for name, row in rows])
        if errors := [f"- {name}: {row.error}" for name, row in rows if row.error]:
            lines += ["", *errors]
    return [*lines, "", *harness.environment(peers.PACKAGES)]


def _cells(row: Figures, largest: int) -> list[str]:
    """Return the cells of one optimizer; what is missing is a dash."""
    sizes = [None if each is None else format_bytes(each) for each in (row.state, row.predicted, row.temporaries)]
    cells = [
        row.ratio and f"{row.ratio.median:.2f}",
        row.ratio and f"{row.ratio.low:.2f} – {row.ratio.high:.2f}",
        harness.milliseconds(row.seconds),
        None if row.first is None else f"{row.first:.2f}",
        *sizes,
        None if row.temporaries is None else f"{row.temporaries / largest:.2f}",
    ]
    return [cell or "—" for cell in cells]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every run and write the page."""
    parser = harness.parser(__doc__)
    parser.add_argument("--runs", default="", help="measure only the runs whose title contains this")
    parser.add_argument("--rounds", type=int, default=15, help="the most measured steps of an optimizer (default: 15)")
    parser.add_argument("--threads", type=int, default=harness.cores(), help="of torch (default: all cores)")
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # of bitsandbytes' own OpenMP, which loads with its rows
    runs = [run for run in RUNS if given.runs in run.title]
    if not runs:
        parser.error(f"--runs {given.runs}: no title contains it, of {'; '.join(run.title for run in RUNS)}")
    results: dict[str, dict[str, Figures]] = {}
    for run in runs:
        busy = psutil.cpu_percent(interval=1) / 100 * (psutil.cpu_count() or 1)
        print(f"{run.title}: {busy:.2f} cores are busy with other work", file=sys.stderr)
        results[run.title] = measure(run, given.rounds, given.threads)
        written = page(results, given.rounds, given.threads)
        raw = {title: {name: asdict(row) for name, row in rows.items()} for title, rows in results.items()}
        harness.publish(given, "step", written, raw)
    print("\n".join(written))


if __name__ == "__main__":
    main()
