"""The processes of a run that torchrun has started: their ranks, and their communication."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from floragrad.cli.errors import LostError, StorageError, UserError
from floragrad.cli.machine import started
from floragrad.cli.train.config import RunConfig

T = TypeVar("T")

_PATIENCE: Final = timedelta(days=7)
"""Time that the others wait for the leader to read and tokenize a text."""
_LAUNCHER: Final = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets, beside WORLD_SIZE."""


@dataclass(frozen=True)
class Processes:
    """The processes that train one run together. The first one leads: it alone prints, and writes the folder.

    Attributes:
        rank: This process among them.
        size: How many they are.
        sharded: Whether each keeps its part of the model only.
        timeout: Seconds until a process that does not answer is given up.
        patient: The same processes, in a group that waits longer.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False
    timeout: int = 0
    patient: Any = None

    @property
    def leads(self) -> bool:
        """True for the first process."""
        return self.rank == 0

    @property
    def program(self) -> str:
        """Command that starts as many processes."""
        return "floragrad" if self.size == 1 else f"torchrun --nproc-per-node {self.size} -m floragrad"

    def share(self, make: Callable[[], T]) -> T:
        """Let the leader make something, however long it takes, and give it to all; all raise its exceptions."""
        if self.size == 1:
            return make()
        from torch.distributed import broadcast_object_list

        made: list[Any] = [None, None]
        if self.leads:
            try:
                made[0] = make()
            except StorageError as error:
                made[1] = UserError(str(error))  # all know it then
            except (UserError, KeyboardInterrupt) as error:
                made[1] = error
        broadcast_object_list(made, src=0, group=self.patient)
        if made[1] is not None:
            raise made[1]
        found: T = made[0]
        return found

    def wait(self) -> None:
        """Go on when all have come here."""
        self.largest(0)

    def largest(self, value: int) -> int:
        """Return the largest of the processes' values, the same on all."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        found = torch.tensor(value)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def total(self, *values: float) -> list[float]:
        """Return the sums of the processes' values, the same on all."""
        if self.size == 1:
            return list(values)
        import torch
        from torch import distributed

        sums = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(sums)
        return [float(each) for each in sums]

    @contextlib.contextmanager
    def together(self, folder: Path | None = None) -> Iterator[None]:
        """Raise a LostError where another process is gone, or does not answer. ``folder`` can be continued, if any."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_lost(error):
                raise
            resume = f"continue with: {self.program} train --resume {folder}"
            raise LostError(
                f"process {self.rank} of {self.size} stops, for another one died or did not answer for --timeout "
                f"{self.timeout} seconds: see what that one said; "
                + ("nothing has been saved" if folder is None else resume)
            ) from error


ALONE: Final = Processes()
"""A run of one process."""


def join(config: RunConfig) -> Processes:
    """Meet the other processes, if torchrun has started several; refuse a number that cannot train this run."""
    size = started()
    if size == 1:
        for name in (*_LAUNCHER, "WORLD_SIZE"):  # or the Trainer would make a group of one
            os.environ.pop(name, None)
        return ALONE
    missing = [name for name in _LAUNCHER if name not in os.environ]
    if missing:
        raise UserError(
            f"this is one of {size} processes (WORLD_SIZE), and {', '.join(missing)} are not set: start them with "
            f"torchrun --nproc-per-node {size} -m floragrad train"
        )
    if config.batch_size % size:
        fitting = [number for number in range(1, config.batch_size + 1) if config.batch_size % number == 0]
        raise UserError(
            f"--batch-size {config.batch_size} cannot be divided over {size} processes: give a multiple of {size} "
            f"to a new run, or start {', '.join(map(str, fitting))} of them"
        )
    return _meet(config, size)


def _meet(config: RunConfig, size: int) -> Processes:
    """Begin to talk."""
    import torch
    from torch import distributed

    here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if 0 < gpus < here:
        raise UserError(f"{here} processes share {gpus} GPUs: start at most one for each GPU (--nproc-per-node {gpus})")
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
    patient = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    return Processes(distributed.get_rank(), size, config.fsdp, config.timeout, patient)


def _is_lost(error: RuntimeError) -> bool:
    """Return whether an error comes from a collective with another process; gloo raises bare RuntimeErrors."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)
