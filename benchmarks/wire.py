"""Measure bytes sent, time and loss of data parallelism with gradients, and with sketches of them.

    python -m benchmarks.wire

Processes of this machine train a small Llama on the bytes of Python's standard library, with AdamW: in windows of 8
micro-batches, and in plain steps. All methods take turns, update by update. Bytes are those that the loopback interface
sends meanwhile, divided by the processes, with TCP's headers and other programs' traffic: leave the machine alone.
"""

import json
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import psutil
import torch
from torch import Tensor, distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import harness
from floragrad import FloraHookState, GradientAccumulator, flora_hook
from floragrad._text import format_bytes

MICRO_BATCHES = 8
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
SEQUENCES, LENGTH = 4, 64
LR = 2e-3
ONE_BUCKET = 100
"""MB of a bucket. With gloo, powerSGD_hook's messages of two buckets meet in an order that differs between ranks."""
UNTIMED = 3
"""First updates of each method, which build buckets and warm up."""


def text() -> Tensor:
    """Return the bytes of the standard library's modules."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def crops(data: Tensor, count: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(data) - LENGTH, (count,), generator=generator).tolist()
    return torch.stack([data[start : start + LENGTH] for start in starts]).long()


class Job:
    """A model that one method trains, in DistributedDataParallel or with an accumulator.

    Args:
        seed: Of the weights, the same on all ranks.
        once: Average gradients in the last micro-batch of a window only.
        hook: A communication hook, and the function that makes its state.
        accumulator: Options of :class:`floragrad.GradientAccumulator`, which replaces DistributedDataParallel.
    """

    def __init__(
        self,
        seed: int,
        once: bool = False,
        hook: tuple[Callable[..., Any], Callable[[], Any]] | None = None,
        accumulator: dict[str, Any] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.bare = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **SIZES))
        self.optimizer = torch.optim.AdamW(self.bare.parameters(), lr=LR, weight_decay=0.01)
        self.model: Any = self.bare
        self.once, self.accumulator = once, None
        if accumulator is not None:
            self.accumulator = GradientAccumulator(self.optimizer, MICRO_BATCHES, **accumulator)
            return
        self.model = DistributedDataParallel(self.bare, bucket_cap_mb=ONE_BUCKET)
        if hook is not None:
            self.model.register_comm_hook(hook[1](), hook[0])

    def train(self, batches: list[Tensor]) -> None:
        """Make one update."""
        for number, tokens in enumerate(batches, start=1):
            with self.model.no_sync() if self.once and number < len(batches) else nullcontext():
                loss = self.model(input_ids=tokens, labels=tokens).loss
                if self.accumulator is None:
                    (loss / len(batches)).backward()
                else:
                    self.accumulator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()


def power(rank: int) -> Callable[[int], Job]:
    state = partial(PowerSGDState, None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    return partial(Job, hook=(powerSGD_hook, state))


def flora(*, error_feedback: bool = True, **options: Any) -> Callable[[int], Job]:
    return partial(Job, hook=(flora_hook, partial(FloraHookState, error_feedback=error_feedback, **options)))


# A rank r of PowerSGD sends r(m + n) elements of a matrix, a ratio ρ sends mn/ρ: of 128 x 128 the same at rρ = 64.
METHODS: dict[str, dict[str, Callable[[int], Job]]] = {
    "Windows": {
        "DDP, every micro-batch": Job,
        "DDP, no_sync": partial(Job, once=True),
        "accumulator, float32, ρ = 2": partial(Job, accumulator={"state_dtype": "float32", "ratio": 2}),
        "accumulator, int8": partial(Job, accumulator={"state_dtype": "int8"}),
        "accumulator, int4": partial(Job, accumulator={}),
    },
    "Plain steps": {
        "DDP, all-reduce": Job,
        "fp16_compress_hook": partial(Job, hook=(fp16_compress_hook, lambda: None)),
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
"""By kind; the first of a kind is the reference of its times."""


def sent_bytes() -> int:
    counters = psutil.net_io_counters(pernic=True)
    return int(next(found.bytes_sent for name, found in counters.items() if name.startswith("lo")))


def train(kind: str, seed: int, updates: int, rank: int, size: int) -> dict[str, dict[str, Any]]:
    """Train all methods of a kind side by side; return seconds and bytes of each update, and the last loss."""
    data = text()
    training, validation = data[: -(len(data) // 10)], data[-(len(data) // 10) :]
    jobs = {name: make(seed) for name, make in METHODS[kind].items()}
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "sent": []} for name in jobs}
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    for _ in range(updates):
        count = MICRO_BATCHES if kind == "Windows" else 1
        batches = [crops(training, SEQUENCES, generator) for _ in range(count)]
        for name, job in jobs.items():
            distributed.barrier()
            started, before = time.perf_counter(), sent_bytes()
            job.train(batches)
            distributed.barrier()
            found[name]["seconds"].append(time.perf_counter() - started)
            found[name]["sent"].append((sent_bytes() - before) / size)
    tokens = crops(validation, 64, torch.Generator().manual_seed(0))
    for name, job in jobs.items():
        with torch.no_grad():
            found[name]["loss"] = float(job.bare(input_ids=tokens, labels=tokens).loss)
    return found


def work(rank: int, size: int, folder: str, updates: dict[str, int], seeds: int) -> None:
    """Run everything in one of the processes; the first writes the results."""
    torch.set_num_threads(1)
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    found = {kind: [train(kind, seed, updates[kind], rank, size) for seed in range(seeds)] for kind in METHODS}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def cells(runs: list[dict[str, dict[str, Any]]]) -> list[tuple[str, ...]]:
    """Return one row a method, over all seeds."""

    def timed(name: str, key: str) -> list[float]:
        return [value for run in runs for value in run[name][key][UNTIMED:]]

    rows = []
    base = timed(next(iter(runs[0])), "seconds")
    for name in runs[0]:
        losses = [run[name]["loss"] for run in runs]
        loss = f"{mean(losses):.4f}" + (f" ± {stdev(losses):.4f}" if len(losses) > 1 else "")
        seconds = timed(name, "seconds")
        sent = format_bytes(round(median(timed(name, "sent"))))
        rows.append((name, sent, str(harness.ratio(seconds, base)), harness.milliseconds(seconds), loss))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--processes", type=int, default=2, help="that train together (default: 2)")
    parser.add_argument("--windows", type=int, default=40, help="of 8 micro-batches (default: 40)")
    parser.add_argument("--steps", type=int, default=160, help="of one micro-batch (default: 160)")
    parser.add_argument("--seeds", type=int, default=3, help="of model and data (default: 3)")
    given = parser.parse_args(arguments)
    updates = {"Windows": given.windows, "Plain steps": given.steps}
    if min(updates.values()) < UNTIMED + 2:
        parser.error(f"--windows and --steps: at least {UNTIMED + 2}, of which the first {UNTIMED} are not timed")
    with tempfile.TemporaryDirectory() as folder:
        shared = (given.processes, folder, updates, given.seeds)
        torch.multiprocessing.spawn(work, shared, nprocs=given.processes)
        found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    page = [
        "# Bytes sent by data parallelism",
        "",
        f"{given.processes} processes with gloo over the loopback interface, one thread each; a Llama of 0.87M "
        f"parameters on the bytes of Python's standard library, AdamW, learning rate {LR:g}, micro-batches of "
        f"{SEQUENCES} x {LENGTH} bytes, windows of {MICRO_BATCHES}. *Sent*: bytes of the median update for each "
        "process. *Time*: of an update with forward and backward passes, as a ratio to the first row's of the same "
        "round; median and quartiles. "
        f"*Validation loss*: mean and standard deviation over {given.seeds} seeds.",
    ]
    for kind, runs in found.items():
        header = ("gradients", "sent", "time (quartiles)", "median, ms", "validation loss")
        page += ["", f"## {kind}", "", f"{updates[kind]} updates.", "", *harness.table(header, cells(runs))]
    page += ["", *harness.environment(("floragrad", "torch", "transformers"))]
    harness.publish(given, "wire", page, found)
    print("\n".join(page))


if __name__ == "__main__":
    main()
