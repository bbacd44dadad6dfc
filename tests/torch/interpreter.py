"""Triton's interpreter, in which kernels run on CPU tensors, without what makes it slow.

``TRITON_INTERPRET=1`` has to be set before triton is imported: ``tests/conftest.py`` sets it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter

from floragrad.torch import backends
from floragrad.torch.backends.triton import step
from floragrad.torch.backends.triton.launch import Launch


def make_fast() -> None:
    """Spare what each call of a helper, and each product of 64-bit integers, would repeat."""
    interpreter.InterpretedFunction.__call__ = _call
    interpreter.np_umulhi_u64 = _upper_product


@cache
def _prepared(function: Any) -> Any:
    # Names of triton.language that a helper uses stay replaced; the launch replaces those of the kernel.
    interpreter._patch_lang(function.fn)
    return function.rewrite()


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return _prepared(function)(*args, **kwargs)


def _upper_product(a: Any, b: Any) -> Any:
    """The upper 64 bits of products of unsigned integers, of products of their halves."""
    a, b = np.asarray(a, dtype=np.uint64), np.asarray(b, dtype=np.uint64)
    half, low = np.uint64(32), np.uint64(2**32 - 1)
    a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
    middle = a_high * b_low + ((a_low * b_low) >> half)
    other = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> half) + (other >> half)


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step tensors by the Triton kernels, in the interpreter; a tensor that they cannot take fails its test."""
    make_fast()
    step.absence.cache_clear()
    monkeypatch.setattr(step, "DEVICES", {"cpu"})
    monkeypatch.setattr(backends, "BACKENDS", (step,))


@contextmanager
def launched(monkeypatch: pytest.MonkeyPatch, *, run: bool = True) -> Iterator[list[Launch]]:
    """The launches that are made meanwhile; with ``run=False`` they compute nothing, for tests that count them."""
    made: list[Launch] = []
    original = Launch.run

    def remember(launch: Launch) -> None:
        made.append(launch)
        if run:
            original(launch)

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "run", remember)
        yield made


class Accesses:
    """Bytes that kernels read and write, by the tensor that they lie in; an access to no tensor at all fails.

    Args:
        tensors: By name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self._ranges = [
            (name, each.data_ptr(), each.data_ptr() + each.nbytes) for name, each in tensors.items() if each.numel()
        ]

    def count(self, kind: Counter[str], pointers: Any, mask: Any) -> None:
        size = pointers.dtype.element_ty.primitive_bitwidth // 8
        found = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].astype(np.uint64)
        left = found.size
        for name, first, end in self._ranges:
            inside = int(((found >= first) & (found + np.uint64(size) <= end)).sum())
            kind[name] += inside * size
            left -= inside
        assert not left, f"{left} accesses to memory that was not given, of {found.size}"


@contextmanager
def accesses(tensors: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[Accesses]:
    """Count what kernels read and write meanwhile, besides their tables and workspaces."""
    seen, builder = Accesses(tensors), interpreter.InterpreterBuilder
    load, store, run = builder.create_masked_load, builder.create_masked_store, Launch.run

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        seen.count(seen.read, pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        seen.count(seen.written, pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    def run_with_own(launch: Launch) -> None:
        before, known = seen._ranges, {first for _, first, _ in seen._ranges}
        for name, each in launch.arguments.items():
            if isinstance(each, Tensor) and each.numel() and each.data_ptr() not in known:
                known.add(each.data_ptr())
                seen._ranges = [*seen._ranges, (name, each.data_ptr(), each.data_ptr() + each.nbytes)]
        run(launch)
        seen._ranges = before

    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        patch.setattr(Launch, "run", run_with_own)
        yield seen
