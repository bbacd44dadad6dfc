"""Measure what replicas of FSDP2 shards send and keep, and simulate their step time against the speed of the link.

    unshare --net sh -c 'ip link set lo up && python -m benchmarks.replicas'

Four processes of this machine, two replicas of two shards, train a small Llama in windows of micro-batches. Bytes are
those that the loopback interface sends in a window, divided by the processes; a network namespace of its own
(``unshare``) keeps other programs' traffic out. Bytes between the replicas are the difference to the first row, whose
replicas exchange nothing. Bytes of gradients are the live storages, seen by a dispatch mode, that a micro-batch before
the last has left.

The second table is arithmetic on the measured bytes: a model of 8B parameters on two machines of eight devices.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import harness
from benchmarks.wire import LENGTH, LR, MICRO_BATCHES, SEQUENCES, SIZES, crops, sent_bytes, text
from floragrad import GradientAccumulator
from floragrad._text import format_bytes
from floragrad.cli.plan.tracker import MemoryTracker
from floragrad.torch.distributed.collectives import to_local

REPLICAS, SHARDS = 2, 2
EXCHANGED = "sketches between replicas, "


class Job:
    """A model that one method trains on one of the processes.

    Args:
        seed: Of the weights, the same on all ranks.
        native: Shard with FSDP2's own replication, else within the replica alone.
        reduces: With exact gradients: ``"always"``, or in the last micro-batch of a window ``"all"`` gradients, or
            those ``"between"`` replicas.
        accumulator: Options of :class:`floragrad.GradientAccumulator`.
        deferred: Reduce within the replica at the end of the window too.
    """

    def __init__(
        self,
        seed: int,
        mesh: DeviceMesh,
        native: bool = False,
        reduces: str = "always",
        accumulator: dict[str, Any] | None = None,
        deferred: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, use_cache=False, **SIZES)
        self.model: Any = LlamaForCausalLM(config)
        for part in (*self.model.model.layers, self.model):
            fully_shard(part, mesh=mesh if native else mesh["shard"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.01)
        self.reduces, self.accumulator = reduces, None
        if accumulator is not None:
            options = {"defer_reduction": self.model} if deferred else {}
            group = mesh["replicate"].get_group()
            self.accumulator = GradientAccumulator(
                self.optimizer, MICRO_BATCHES, process_group=group, **options, **accumulator
            )

    def train(self, batches: list[Tensor], tracker: "Live | None" = None) -> int:
        """Make one update; return the bytes of gradients that the micro-batches before the last have left."""
        left = 0
        with tracker or nullcontext():
            for number, tokens in enumerate(batches, start=1):
                is_last = number == len(batches)
                if self.reduces == "all":
                    self.model.set_requires_gradient_sync(is_last)
                elif self.reduces == "between":
                    self.model.set_requires_all_reduce(is_last)
                if is_last and tracker is not None:
                    left = tracker.bytes_besides(self._kept())
                    if self.accumulator is not None:
                        left += self.accumulator.report().state_bytes
                loss = self.model(input_ids=tokens, labels=tokens).loss
                if self.accumulator is None:
                    (loss / len(batches)).backward()
                else:
                    self.accumulator.backward(loss)
                del loss
        self.optimizer.step()
        self.optimizer.zero_grad()
        return left

    def _kept(self) -> Iterator[Tensor]:
        """Yield what is no gradient, or is counted by the accumulator."""
        yield from self.model.buffers()
        for param in self.model.parameters():
            yield to_local(param)
        for entry in self.accumulator._entries if self.accumulator is not None else ():
            for sketch in entry.sketches:
                yield from sketch.buffers.values()


class Live(MemoryTracker):
    """Storages that are alive, in the size that they have now: FSDP2 empties those of gathered weights."""

    def bytes_besides(self, tensors: Iterable[Tensor]) -> int:
        """Return their bytes without those of some tensors."""
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        alive = [storage for held in self._known.values() if (storage := held.storage()) is not None]
        return sum(storage.nbytes() for storage in alive if storage._cdata not in known)


def sketches(state_dtype: str, **options: Any) -> Callable[..., Job]:
    return partial(Job, accumulator={"state_dtype": state_dtype}, **options)


METHODS: dict[str, Callable[..., Job]] = {
    "within a replica alone": Job,
    "HSDP, every micro-batch": partial(Job, native=True),
    "HSDP, between replicas once": partial(Job, native=True, reduces="between"),
    "HSDP, no_sync": partial(Job, native=True, reduces="all"),
    f"{EXCHANGED}float32": sketches("float32"),
    f"{EXCHANGED}int8": sketches("int8"),
    f"{EXCHANGED}int4": sketches("int4"),
    "deferred, and sketches, float32": sketches("float32", deferred=True),
    "deferred, and sketches, int4": sketches("int4", deferred=True),
}
"""The first sends nothing between replicas."""
REDUCED_ONCE = ("HSDP, no_sync", "deferred, and sketches, float32", "deferred, and sketches, int4")
"""Those that send less within a replica too: the difference to the first is not what they send between replicas."""


@dataclass(frozen=True)
class Cluster:
    """Machines of equal devices that hold a replica each.

    Attributes:
        parameters: Of the model.
        replicas: Number of machines.
        devices: Devices of a machine, which share its link.
        compute: Seconds of a micro-batch without communication between machines.
        micro_batches: Of a window.
    """

    parameters: float = 8e9
    replicas: int = 2
    devices: int = 8
    compute: float = 10.8
    micro_batches: int = 8

    def seconds(self, element_bytes: float, times: int, gigabits: float) -> float:
        """Return the time of a step whose gradients cross the link, and nothing overlaps.

        Every device sends 2(R − 1)/R times its shard's bytes, all devices of a machine through one link.
        """
        sent = 2 * (self.replicas - 1) / self.replicas * element_bytes * self.parameters
        return self.micro_batches * self.compute + times * sent * 8 / (gigabits * 1e9)


LINKS = (1, 10, 25, 100, 400)
"""Gigabits a second of a machine."""


def simulated(cluster: Cluster, bytes_of: dict[str, float]) -> list[str]:
    """Return a table of step times; ``bytes_of`` has bytes for each element by format of what is sent."""
    rows = []
    for name, element_bytes in bytes_of.items():
        for times in (cluster.micro_batches, 1) if name == "gradients" else (1,):
            how = "every micro-batch" if times > 1 else "once"
            seconds = [cluster.seconds(element_bytes, times, link) for link in LINKS]
            cells = [f"{value:.1f} s ({value / cluster.seconds(0.0, 0, 1):.2f})" for value in seconds]
            rows.append((f"{name}, {how}", f"{element_bytes:.3f}", *cells))
    header = ("between machines", "bytes an element", *(f"{link} Gb/s" for link in LINKS))
    return harness.table(header, rows)


def work(rank: int, folder: str, windows: int, seeds: int) -> None:
    """Train all methods side by side in one of the processes; the first writes the results."""
    torch.set_num_threads(1)
    size = REPLICAS * SHARDS
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (REPLICAS, SHARDS), mesh_dim_names=("replicate", "shard"))
    data, runs = text(), []
    training, validation = data[: -(len(data) // 10)], data[-(len(data) // 10) :]
    for seed in range(seeds):
        jobs = {name: make(seed, mesh) for name, make in METHODS.items()}
        found: dict[str, dict[str, Any]] = {name: {"sent": [], "left": 0} for name in jobs}
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        for window in range(windows):
            batches = [crops(training, SEQUENCES, generator) for _ in range(MICRO_BATCHES)]
            for name, job in jobs.items():
                distributed.barrier()
                before = sent_bytes()
                # The first window allocates what stays; a dispatch mode in it would count that.
                tracker = Live() if window == 1 else None
                left = job.train(batches, tracker)
                distributed.barrier()
                found[name]["sent"].append((sent_bytes() - before) / size)
                found[name]["left"] = max(found[name]["left"], left)
        tokens = crops(validation, 64, torch.Generator().manual_seed(0))
        for name, job in jobs.items():
            with torch.no_grad():
                found[name]["loss"] = float(job.model(input_ids=tokens, labels=tokens).loss)
        runs.append(found)
    if rank == 0:
        count = sum(param.numel() for param in LlamaForCausalLM(jobs[next(iter(jobs))].model.config).parameters())
        (Path(folder) / "found.json").write_text(json.dumps({"parameters": count, "runs": runs}), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def cells(found: dict[str, Any]) -> tuple[list[tuple[str, ...]], dict[str, float]]:
    """Return one row a method over all seeds, and the bytes that cross the link for each element, by format."""
    runs, count = found["runs"], found["parameters"]
    sent = {name: median(value for run in runs for value in run[name]["sent"][1:]) for name in METHODS}
    base = sent[next(iter(METHODS))]
    rows = []
    for name, value in sent.items():
        losses = [run[name]["loss"] for run in runs]
        loss = f"{mean(losses):.4f}" + (f" ± {stdev(losses):.4f}" if len(losses) > 1 else "")
        left = max(run[name]["left"] for run in runs)
        kept = f"{format_bytes(left)} ({left / count:.2f})"
        between = "" if name in REDUCED_ONCE else format_bytes(round(value - base))
        rows.append((name, format_bytes(round(value)), between, kept, loss))
    crossed = {"gradients": sent["HSDP, between replicas once"]}
    crossed |= {f"sketches, {name}": sent[f"{EXCHANGED}{name}"] for name in ("float32", "int8", "int4")}
    part = 2 * (REPLICAS - 1) / REPLICAS * count / SHARDS
    return rows, {name: (value - base) / part for name, value in crossed.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--windows", type=int, default=200, help="of 8 micro-batches (default: 200)")
    parser.add_argument("--seeds", type=int, default=3, help="of model and data (default: 3)")
    given = parser.parse_args(arguments)
    if given.windows < 2:
        parser.error("--windows: at least 2, of which the first allocates what stays")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, given.windows, given.seeds), nprocs=REPLICAS * SHARDS)
        found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    rows, bytes_of = cells(found)
    cluster = Cluster()
    page = [
        "# Replicas of shards",
        "",
        f"{REPLICAS} replicas of {SHARDS} shards, gloo over the loopback interface, one thread each; a Llama of "
        f"{found['parameters'] / 1e6:.2f}M parameters on the bytes of Python's standard library, AdamW, learning rate "
        f"{LR:g}, micro-batches of {SEQUENCES} x {LENGTH} bytes, {given.windows} windows of {MICRO_BATCHES}. *Sent*: "
        "bytes of the median window for each process. *Between replicas*: the difference to the first row, where as "
        "much is sent within a replica. *Kept*: bytes of gradients on a rank between two micro-batches, and for a "
        f"parameter of the model. *Validation loss*: {given.seeds} seed{'s' * (given.seeds > 1)}.",
        "",
        *harness.table(("gradients", "sent", "between replicas", "kept (a parameter)", "validation loss"), rows),
        "",
        "## Simulated step times",
        "",
        f"A model of {cluster.parameters / 1e9:.0f}B parameters on {cluster.replicas} machines of {cluster.devices} "
        f"devices, {cluster.micro_batches} micro-batches of {cluster.compute} s each, one link a machine: compute and "
        "communication one after the other, with the bytes an element that are measured above. Arithmetic, no "
        "measurement: folding, latency and overlap are left out. In parentheses: ratio to a link of infinite speed.",
        "",
        *simulated(cluster, bytes_of),
        "",
        *harness.environment(("floragrad", "torch", "transformers")),
    ]
    harness.publish(given, "replicas", page, found)
    print("\n".join(page))


if __name__ == "__main__":
    main()
