"""The process and the machine: threads, device, quiet libraries, memory, versions."""

import logging
import os
import platform
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from floragrad._extras import require
from floragrad.cli.errors import UserError

MODULES: Final = ("tokenizers", "transformers", "psutil", "datasets", "matplotlib")
BACKEND_MODULES: Final = {"torch": ("torch", "accelerate"), "jax": ("jax", "optax", "flax", "orbax.checkpoint")}
EXTRAS: Final = {"torch": "train", "jax": "train-jax"}
MOST_THREADS = 8
"""Small models get slower, not faster, with more threads than this."""


class Gpu(NamedTuple):
    """A GPU, as the framework sees it: the device's name, and functions for the bytes in use now and at most."""

    name: str
    allocated: Callable[[], int]
    peak: Callable[[], int]


def available_cores() -> int:
    """Cores that this process may use: by its affinity, and by its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.is_file():
        quota, period = quota_file.read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def default_threads() -> int:
    """Threads to compute with: OMP_NUM_THREADS where it is set, else the cores there are, up to a bound."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else min(available_cores(), MOST_THREADS)


def started() -> int:
    """Return the number of processes that were started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_spokesman() -> bool:
    """Return whether this is the first process of its machine, which prints messages that all of them know."""
    return started() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"


def prepare(backend: str, hub: bool, several: bool = False) -> None:
    """Make the process ready to train, before a framework is imported: one device, no foreign output.

    Args:
        backend: ``"torch"`` or ``"jax"``, whose extra must be installed.
        hub: Whether the Hugging Face hub will be asked for something.
        several: Whether the process may be one of several.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and not several:
        raise UserError(
            f"this is one of {processes} processes, and only floragrad train takes several, with --backend torch: "
            "start this without torchrun (floragrad compare gives each run a process of its own)"
        )
    if processes == 1:  # with several visible devices the Trainer would wrap the model in DataParallel
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    # What cuBLAS needs to be deterministic; a run that cannot be repeated cannot be resumed bit for bit.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # advice that each process would write
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch, which JAX does without
    if hub and not _hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        for module in (*BACKEND_MODULES[backend], *MODULES):
            require(module, EXTRAS[backend])
    except ImportError as error:
        raise UserError(str(error)) from error
    _silence()


def _silence() -> None:
    """Leave the screen to us: an error reaches the user as an exception, not as a log line."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", module=r"(transformers|datasets|accelerate|huggingface_hub|torch)\b")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in ("huggingface_hub", "accelerate", "fsspec", "torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _hub_answers() -> bool:
    """Return whether the hub can be reached. Where it cannot, its client would try again for half a minute."""
    if any(os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True  # the user has decided already, or a proxy answers in its place
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def configure_torch(threads: int) -> None:
    """Set torch's threads, and choose deterministic kernels wherever there are some."""
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def configure_jax(threads: int) -> None:
    """Set the threads of JAX's CPU client, which reads them when it starts: before the first array is made."""
    os.environ["PJRT_NPROC"] = str(threads)


def torch_gpu() -> Gpu | None:
    """Return the GPU that torch computes on, if any."""
    import torch

    if not torch.cuda.is_available():
        return None
    return Gpu(torch.cuda.get_device_name(), torch.cuda.memory_allocated, torch.cuda.max_memory_allocated)


def memory_bytes(gpu: Gpu | None) -> int:
    """Memory in use now: the GPU's allocations, or the process's resident set."""
    return int(import_module("psutil").Process().memory_info().rss) if gpu is None else gpu.allocated()


def peak_memory_bytes(gpu: Gpu | None) -> int:
    """Return the most memory ever used: the GPU's allocations, or the process's resident set."""
    if gpu is not None:
        return gpu.peak()
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its peak is inherited from the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    memory = import_module("psutil").Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """Return the versions that a result depends on, those of some libraries among them."""
    found = {name: version(name) for name in libraries}
    return {"python": platform.python_version(), "floragrad": version("floragrad"), **found}


def describe(gpu: Gpu | None) -> str:
    """Return the machine in a few words: the processor, the cores, the GPU."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    words = f"{processor}, {available_cores()} cores"
    return words if gpu is None else f"{words}, {gpu.name}"
