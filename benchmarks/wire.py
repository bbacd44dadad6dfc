"""What data parallelism sends, how long it takes and where it leads: gradients, or sketches of them.

    python -m benchmarks.wire --out benchmarks/results/wire

Processes of this machine train a small Llama on the bytes of Python's standard library, with AdamW. Once in windows of
8 micro-batches, once in plain steps. All ways take turns, window by window, so that what else the machine does meets
all of them. Bytes are those that the loopback interface has sent meanwhile, divided by the processes: TCP's headers and
acknowledgements are in, and so is what other programs send there, so leave the machine alone.
"""

import argparse
import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, quantiles, stdev
from typing import Any

import psutil
import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from floragrad import FloraHookState, GradientAccumulator, flora_hook
from floragrad._text import format_bytes, format_table

MICRO_BATCHES = 8
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
SEQUENCES, LENGTH = 4, 64
LR = 2e-3
ONE_BUCKET = 100
"""In MB: with gloo, powerSGD_hook's messages of two buckets meet in an order that differs between the ranks."""
BASE = {"window": "DDP, every micro-batch", "step": "DDP, all-reduce"}


def text() -> Tensor:
    """The standard library's modules, byte by byte; the last tenth is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def crops(data: Tensor, count: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(data) - LENGTH, (count,), generator=generator).tolist()
    return torch.stack([data[start : start + LENGTH] for start in starts]).long()


class Job:
    """A model on its way, trained in one of the ways.

    Args:
        seed: Of the model's numbers, alike on all ranks.
        wrapped: Whether it is in DistributedDataParallel.
    """

    def __init__(self, seed: int, wrapped: bool) -> None:
        torch.manual_seed(seed)
        self.bare = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **SIZES))
        self.model: nn.Module = self.bare
        if wrapped:
            self.model = DistributedDataParallel(self.bare, bucket_cap_mb=ONE_BUCKET)
        self.optimizer = torch.optim.AdamW(self.bare.parameters(), lr=LR, weight_decay=0.01)

    def loss(self, tokens: Tensor) -> Tensor:
        """Of one micro-batch."""
        loss = self.model(input_ids=tokens, labels=tokens).loss
        assert isinstance(loss, Tensor)
        return loss

    def train(self, batches: list[Tensor]) -> None:
        """One update."""
        raise NotImplementedError

    def update(self) -> None:
        """From what is in ``.grad``."""
        self.optimizer.step()
        self.optimizer.zero_grad()


class Exact(Job):
    """Gradients are summed in ``.grad``, and averaged after every micro-batch or only after the last."""

    def __init__(self, seed: int, once: bool) -> None:
        super().__init__(seed, True)
        self.once = once

    def train(self, batches: list[Tensor]) -> None:
        """One update."""
        assert isinstance(self.model, DistributedDataParallel)
        for number, tokens in enumerate(batches, start=1):
            with self.model.no_sync() if self.once and number < len(batches) else nullcontext():
                (self.loss(tokens) / len(batches)).backward()
        self.update()


class Sketched(Job):
    """Sketches are summed over the processes, once in a window."""

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(seed, False)
        self.accumulator = GradientAccumulator(self.optimizer, MICRO_BATCHES, **options)

    def train(self, batches: list[Tensor]) -> None:
        """One update."""
        for tokens in batches:
            self.accumulator.backward(self.loss(tokens))
        self.update()


class Hooked(Job):
    """A communication hook averages the gradients of every step."""

    def __init__(self, seed: int, hook: Callable[..., Any], state: Callable[[], Any]) -> None:
        super().__init__(seed, True)
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(state(), hook)

    def train(self, batches: list[Tensor]) -> None:
        """One update."""
        for tokens in batches:
            self.loss(tokens).backward()
        self.update()


def power(rank: int) -> Callable[[int], Job]:
    state = partial(PowerSGDState, None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    return partial(Hooked, hook=powerSGD_hook, state=state)


def flora(*, error_feedback: bool = True, **options: Any) -> Callable[[int], Job]:
    return partial(Hooked, hook=flora_hook, state=partial(FloraHookState, error_feedback=error_feedback, **options))


# A rank r of PowerSGD sends r(m + n) numbers of a matrix, a ratio ρ sends mn/ρ: of 128 x 128 the same at rρ = 64.
WAYS: dict[str, dict[str, Callable[[int], Job]]] = {
    "window": {
        BASE["window"]: partial(Exact, once=False),
        "DDP, no_sync": partial(Exact, once=True),
        "accumulator, float32, ρ = 2": partial(Sketched, state_dtype="float32", ratio=2),
        "accumulator, int8": partial(Sketched, state_dtype="int8"),
        "accumulator, int4": Sketched,
    },
    "step": {
        BASE["step"]: partial(Exact, once=False),
        "fp16_compress_hook": partial(Hooked, hook=fp16_compress_hook, state=lambda: None),
        "powerSGD_hook, rank 16": power(16),
        "flora_hook, ρ = 4": flora(ratio=4),
        "flora_hook, ρ = 4, no error feedback": flora(ratio=4, error_feedback=False),
        "powerSGD_hook, rank 4": power(4),
        "flora_hook, ρ = 16": flora(ratio=16),
        "flora_hook, ρ = 16, no error feedback": flora(ratio=16, error_feedback=False),
        "flora_hook, int8, ρ = 1": flora(ratio=1, state_dtype="int8"),
        "flora_hook, int4, ρ = 1": flora(ratio=1, state_dtype="int4"),
    },
}


@dataclass
class Turn:
    """One update of one way.

    Attributes:
        way: Its name.
        seconds: Of the slowest rank.
        sent: Bytes over the loopback interface, divided by the ranks.
    """

    way: str
    seconds: float
    sent: float


def sent_bytes() -> int:
    counters = psutil.net_io_counters(pernic=True)
    return int(next(found.bytes_sent for name, found in counters.items() if name.startswith("lo")))


def train(kind: str, seed: int, updates: int, rank: int, size: int) -> dict[str, Any]:
    """All ways of a kind side by side; the losses at the end and every turn."""
    data = text()
    held_out = len(data) // 10
    training, validation = data[:-held_out], data[-held_out:]
    jobs = {name: make(seed) for name, make in WAYS[kind].items()}
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    turns: list[Turn] = []
    for _ in range(updates):
        count = MICRO_BATCHES if kind == "window" else 1
        batches = [crops(training, SEQUENCES, generator) for _ in range(count)]
        for name, job in jobs.items():
            distributed.barrier()
            started, before = time.perf_counter(), sent_bytes()
            job.train(batches)
            distributed.barrier()
            turns.append(Turn(name, time.perf_counter() - started, (sent_bytes() - before) / size))
    tokens = crops(validation, 64, torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = {name: float(job.bare(input_ids=tokens, labels=tokens).loss) for name, job in jobs.items()}
    return {
        "losses": losses,
        "turns": [vars(turn) for turn in turns],
        "parameters": sum(param.numel() for param in next(iter(jobs.values())).bare.parameters()),
    }


def work(rank: int, size: int, folder: str, updates: dict[str, int], seeds: int) -> None:
    """A process: everything of all seeds; the first one writes what was found."""
    torch.set_num_threads(1)
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    found = {kind: [train(kind, seed, updates[kind], rank, size) for seed in range(seeds)] for kind in WAYS}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def summary(kind: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a way: bytes of the median update, time as a ratio to the base's of the same round, losses."""
    # The first updates build buckets and warm up.
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS[kind]}
    for run in runs:
        for name, own in turns.items():
            own += [turn for turn in run["turns"] if turn["way"] == name][3:]
    base = [turn["seconds"] for turn in turns[BASE[kind]]]
    rows = []
    for name, own in turns.items():
        ratios = [turn["seconds"] / other for turn, other in zip(own, base, strict=True)]
        losses = [run["losses"][name] for run in runs]
        rows.append(
            {
                "way": name,
                "sent_bytes": median(turn["sent"] for turn in own),
                "ratio": median(ratios),
                "quartiles": quantiles(ratios, n=4)[::2],
                "median_ms": 1000 * median(turn["seconds"] for turn in own),
                "losses": losses,
            }
        )
    return rows


def cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [("gradients", "sent", "time", "quartiles", "median, ms", "validation loss")]
    for row in rows:
        spread = f" ± {stdev(row['losses']):.4f}" if len(row["losses"]) > 1 else ""
        found.append(
            (
                row["way"],
                format_bytes(round(row["sent_bytes"])),
                f"{row['ratio']:.2f}",
                "{:.2f} – {:.2f}".format(*row["quartiles"]),
                f"{row['median_ms']:.1f}",
                f"{mean(row['losses']):.4f}{spread}",
            )
        )
    return found


def markdown(measured: dict[str, Any], command: str) -> str:
    """The page of results."""
    about = (
        f"{measured['size']} processes with gloo over the loopback interface, one thread each; a Llama of "
        f"{measured['parameters'] / 1e6:.2f}M parameters on the bytes of Python's standard library, AdamW, "
        f"learning rate {LR:g} for all, micro-batches of {SEQUENCES} x {LENGTH} bytes. *Sent*: bytes that the "
        "interface has sent in the median update, divided by the processes, TCP's headers and acknowledgements "
        "included. *Time*: of an update, forward and backward passes included, as a ratio to the first row's of the "
        "same round, the ways taking turns; "
        f"median and quartiles. *Validation loss*: mean and standard deviation over {measured['seeds']} seeds."
    )
    lines = ["# What data parallelism sends", "", about, ""]
    titles = {"window": f"Windows of {MICRO_BATCHES} micro-batches", "step": "Plain steps"}
    for kind, title in titles.items():
        header, *body = ("| " + " | ".join(row) + " |" for row in cells(measured[kind]))
        columns = "|" + " --- |" * len(cells(measured[kind])[0])
        lines += [f"## {title}", "", f"{measured['updates'][kind]} updates.", "", header, columns, *body, ""]
    versions = ", ".join(f"{name} {number}" for name, number in measured["versions"].items())
    return "\n".join([*lines, f"- `{command}`", f"- {measured['cores']} cores; {versions}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="that train together (default: 2)")
    parser.add_argument("--windows", type=int, default=40, help="of 8 micro-batches (default: 40)")
    parser.add_argument("--steps", type=int, default=160, help="of one micro-batch (default: 160)")
    parser.add_argument("--seeds", type=int, default=3, help="of model and data (default: 3)")
    parser.add_argument("--out", type=Path, help="write this path with .json and .md")
    given = parser.parse_args()
    updates = {"window": given.windows, "step": given.steps}
    if min(updates.values()) < 5:
        parser.error("--windows and --steps: at least 5, of which the first 3 are not timed")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (given.processes, folder, updates, given.seeds)
        torch.multiprocessing.spawn(work, arguments, nprocs=given.processes)
        runs = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    measured = {
        "size": given.processes,
        "seeds": given.seeds,
        "updates": updates,
        "parameters": runs["window"][0]["parameters"],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        **{kind: summary(kind, runs[kind]) for kind in WAYS},
    }
    for kind in WAYS:
        print("\n".join(format_table(cells(measured[kind]))), end="\n\n")
    if given.out:
        command = f"python -m benchmarks.wire --processes {given.processes} --windows {given.windows} "
        command += f"--steps {given.steps} --seeds {given.seeds} --out {given.out}"
        given.out.with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        given.out.with_suffix(".md").write_text(markdown(measured, command), encoding="utf-8")


if __name__ == "__main__":
    main()
