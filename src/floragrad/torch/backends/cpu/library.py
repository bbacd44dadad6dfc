"""The compiled kernels: their location, their arguments, and the reason where they are missing."""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from floragrad.policy import StateDtype
from floragrad.torch.backends.switch import SWITCH, kernels_allowed
from floragrad.torch.validation import is_plain, unsupported_memory

_INSTRUCTION_SETS: Final = {"AVX512": ("avx512", "avx2", "baseline"), "AVX2": ("avx2", "baseline")}


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Step(ctypes.Structure):
    """Arguments of one tensor's step, as in ``tensor.hpp``."""

    _fields_ = (
        *_fields(ctypes.c_int64, "batch rows columns width value_dtype state_dtype momentum is_vector"),
        *_fields(ctypes.c_int64, "factored adaptive stochastic residual is_resample_step"),
        *_fields(ctypes.c_int64, "all_rows all_elements all_row_words first_row_word matrix_row_words"),
        *_fields(ctypes.c_uint64, "seed tensor_id step resample_index"),
        *_fields(ctypes.c_double, "beta1 beta2 eps keep size clip_threshold"),
        *_fields(ctypes.c_void_p, "grad param data scale row_var col_var variance weight previous kept scratch"),
        *_fields(ctypes.c_void_p, "parallel thread_number"),
        *_fields(ctypes.c_int64, "threads"),
    )


class Fold(ctypes.Structure):
    """Arguments of one fold, as in ``fold.hpp``."""

    _fields_ = (
        *_fields(ctypes.c_int64, "batch rows columns width value_dtype state_dtype is_first measures"),
        *_fields(ctypes.c_int64, "all_row_words first_row_word matrix_row_words"),
        *_fields(ctypes.c_uint64, "seed tensor_id window counter"),
        *_fields(ctypes.c_double, "weight"),
        *_fields(ctypes.c_void_p, "grad data scale column_sizes noise scratch parallel thread_number"),
        *_fields(ctypes.c_int64, "threads"),
    )


class Library(NamedTuple):
    """The kernels for this processor.

    Attributes:
        name: Their instruction set.
        parallel: The address of the entry point of torch's OpenMP runtime.
        thread_number: The address of its ``omp_get_thread_num``.
        scratch_bytes: Scratch bytes of a step, which several steps can share.
        kept_bytes: Bytes that a step keeps between its passes.
        statistics: Of some steps: the sums of G², or the update of an unfactored second moment.
        normalise: Of some steps: the update of a factored second moment from its sums.
        direction: Of some steps: ‖D‖².
        apply: Of some steps: the update of momentum and parameter.
        all_passes: Of some steps of whole tensors: the four above, tensor after tensor.
        power_iteration: One power iteration of one step.
        fold_bytes: Scratch bytes of a fold.
        fold: Fold of a gradient into a sketch.
    """

    name: str
    parallel: int
    thread_number: int
    scratch_bytes: Callable[[Step], int]
    kept_bytes: Callable[[Step], int]
    statistics: Callable[[Any, int], None]
    normalise: Callable[[Any, int], None]
    direction: Callable[[Any, int], None]
    apply: Callable[[Any, int], None]
    all_passes: Callable[[Any, int], None]
    power_iteration: Callable[[Step, int, int], None]
    fold_bytes: Callable[[Fold], int]
    fold: Callable[[Fold], None]


OTHER_VERSION: Final = "the native kernels are of another version: install floragrad again"
DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes of parameters and gradients, as in ``rows.hpp``."""
STATE_DTYPES: Final[dict[StateDtype, int]] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}


def library() -> Library | None:
    """Return the kernels; None if they are turned off or cannot run, see :func:`absence`."""
    found = _found()
    return found if isinstance(found, Library) else None


def absence() -> str:
    """Return why the kernels are missing; empty if they are there."""
    found = _found()
    return "" if isinstance(found, Library) else found


def instruction_sets() -> tuple[str, ...]:
    """Return the builds that this processor can run, best first, from torch's CPU capability."""
    return _INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), ("baseline",))


def unsupported_tensor(tensor: Tensor) -> str:
    """Return why the kernels do not support a tensor; empty if they do."""
    return unsupported_memory(tensor, DTYPES) if tensor.is_cpu else f"on {tensor.device.type}"


def is_addressable(tensor: Tensor) -> bool:
    """Return whether a buffer is a plain contiguous CPU tensor, to be passed by its address."""
    return is_plain(tensor) and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()


@cache
def _found() -> Library | str:
    """Return the kernels, or the reason why they are missing; the switch is read on the first call."""
    if not kernels_allowed():
        return f"{SWITCH}=eager"
    runtime = _torch_library()
    if runtime is None:
        return "torch's own library was not found"
    if not hasattr(runtime, "GOMP_parallel"):
        return "torch's threads are not OpenMP's"
    for name in instruction_sets():
        spec = find_spec(f"floragrad.torch.backends.cpu._{name}")
        if spec is not None and spec.origin is not None:
            try:
                return _loaded(name, ctypes.CDLL(spec.origin), runtime)
            except LookupError:
                return OTHER_VERSION
    return "no native kernels were built: install floragrad where there is a C++ compiler"


def _torch_library() -> ctypes.CDLL | None:
    """Return the library that torch has loaded: from its folder, or in a split installation by its name."""
    beside = next(Path(torch.__file__).parent.glob("lib/*torch_cpu*"), None)
    if beside is not None:
        return ctypes.CDLL(str(beside))
    try:
        return ctypes.CDLL("libtorch_cpu.so", mode=getattr(os, "RTLD_NOLOAD", 0))
    except OSError:  # another name, or torch is linked statically
        return None


def _loaded(name: str, kernels: ctypes.CDLL, runtime: ctypes.CDLL) -> Library | str:
    def function(symbol: str, result: Any, *arguments: Any) -> Any:
        found = getattr(kernels, f"floragrad_{symbol}", None)
        if found is None:
            raise LookupError(symbol)
        found.restype, found.argtypes = result, arguments
        return found

    step, fold, address = ctypes.POINTER(Step), ctypes.POINTER(Fold), ctypes.c_void_p
    sizes = [function(f"{each}_size", ctypes.c_int64)() for each in ("step", "fold")]
    if sizes != [ctypes.sizeof(Step), ctypes.sizeof(Fold)]:
        return OTHER_VERSION
    parallel, number = (
        ctypes.cast(each, address).value for each in (runtime.GOMP_parallel, runtime.omp_get_thread_num)
    )
    assert parallel is not None
    assert number is not None
    return Library(
        name,
        parallel,
        number,
        scratch_bytes=function("scratch_bytes", ctypes.c_int64, step),
        kept_bytes=function("kept_bytes", ctypes.c_int64, step),
        statistics=function("statistics", None, step, ctypes.c_int64),
        normalise=function("normalise", None, step, ctypes.c_int64),
        direction=function("direction", None, step, ctypes.c_int64),
        apply=function("apply", None, step, ctypes.c_int64),
        all_passes=function("all_passes", None, step, ctypes.c_int64),
        power_iteration=function("power_iteration", None, step, address, address),
        fold_bytes=function("fold_bytes", ctypes.c_int64, fold),
        fold=function("fold", None, fold),
    )
