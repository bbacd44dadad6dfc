"""Worker processes that form a gloo process group and stay, so that tests do not pay for their start."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

LIMIT = timedelta(seconds=300)
"""Time after which a call is given up; nothing is measured with it. Collectives wait for half as long."""

IMPORTED = [
    *("torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch._dynamo"),
    *("floragrad.torch", "transformers.models.llama.modeling_llama", "accelerate", "lightning.pytorch"),
]
"""What takes seconds to import and starts no thread, which would not be there after a fork."""


class World:
    """Processes of one group; :meth:`run` calls a function in all of them.

    Args:
        size: How many.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(rank, *args)`` returns on each rank, in order.

        It must be a function of a module, and tensors are returned by value. A rank that raises, or is not
        done in time, ends the processes; the next call starts others.
        """
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send_bytes(pickle.dumps((function, args)))
        try:
            return self._results()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes."""
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers.clear()

    def _results(self) -> list[Any]:
        """Every rank's answer; whatever comes first is read first, for others may be waiting for a rank that raised."""
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        results, deadline = [None] * self.size, time.monotonic() + LIMIT.total_seconds()
        while ranks:
            ready = wait(list(ranks), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(ranks.values())} of {self.size} were not done after {LIMIT}")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = ranks.pop(pipe)
                try:
                    raised, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    raise AssertionError(f"rank {rank} of {self.size} died") from None
                if raised:
                    raise AssertionError(f"on rank {rank} of {self.size}:\n{value}")
                results[rank] = value
        return results

    def _start(self) -> None:
        # Forked from one process that has imported what the tests need: that takes seconds, in each of them.
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        folder = tempfile.mkdtemp(prefix="world")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.size, folder, there), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))


def _work(rank: int, size: int, folder: str, pipe: Connection) -> None:
    """A worker: join the group, then do what comes through the pipe until it closes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=LIMIT / 2)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (False, function(rank, *args))
        except BaseException:
            answer = (True, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
