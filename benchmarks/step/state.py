"""The bytes that optimizers keep between steps, wherever they keep them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def state_bytes(optimizers: Iterable[Any], apart: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that the states of optimizers lead to, each storage once.

    Args:
        optimizers: Whatever has a ``state``.
        apart: Tensors that are not state, though a state may refer to them: parameters and gradients.
    """
    # A parameter is the key of its state.
    return stored_bytes([list(optimizer.state.values()) for optimizer in optimizers], apart)


def stored_bytes(value: Any, apart: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that a value leads to, each storage once.

    Args:
        value: Mappings, sequences, objects with attributes (a projector with its matrix) and tensors that wrap others
            (codes with their scales) are gone through.
        apart: Tensors whose storages do not count, and that are not gone through.
    """
    apart = list(apart)
    seen = {id(tensor) for tensor in apart}
    elsewhere = {tensor.untyped_storage().data_ptr() for tensor in apart}
    sizes: dict[int, int] = {}
    for tensor in _tensors(value, seen):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in elsewhere:
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The plain tensors that a value leads to."""
    if id(value) in seen or isinstance(value, (type, torch.Generator)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            for name in names:
                yield from _tensors(getattr(value, name), seen)
        else:
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each, seen)
    elif isinstance(value, (list, tuple, set)):
        for each in value:
            yield from _tensors(each, seen)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from _tensors(vars(value), seen)
