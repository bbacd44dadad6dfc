"""Validation of parameters, gradients, states and sketches against their plans, before a step or a fold."""

from collections.abc import Container, Iterable, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from floragrad.policy import Buffer

PLAIN: Final = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})
"""Tensor classes without overridden behaviour."""

_STATE_REMEDY: Final = (
    "leave the optimizer's state as it is; load_state_dict() restores a saved one, and "
    "optimizer.state[parameter].clear() begins a new one"
)


class Layout(NamedTuple):
    """Layout of the local part of a parameter and of its state.

    Attributes:
        shape: Of the parameter.
        state: Shape and dtype of each state tensor, but for scalars, which stay on the CPU.
    """

    shape: tuple[int, ...]
    state: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

    @classmethod
    def of(cls, shape: tuple[int, ...], buffers: Mapping[str, Buffer]) -> "Layout":
        """Return the layout of a parameter with these buffers."""
        return cls(shape, {key: (each.shape, getattr(torch, each.dtype)) for key, each in buffers.items()})


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor's class overrides no behaviour."""
    return type(tensor) in PLAIN


def has_memory(tensor: Tensor) -> bool:
    """Return whether the tensor's storage holds all its elements; its owner may have freed or resized it."""
    if not is_plain(tensor):
        return True
    first = tensor.storage_offset() * tensor.itemsize
    size = tensor.nbytes if tensor.is_contiguous() else _extent(tensor)
    # An efficient zero tensor has a storage of the right size without an address.
    if tensor.untyped_storage().nbytes() >= first + size and tensor.data_ptr() != first:
        return True
    return tensor.is_meta or tensor.numel() == 0


def mismatch(tensor: Any, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Return the difference from the expected shape and dtype as the end of a sentence; empty without one."""
    if not isinstance(tensor, Tensor):
        return f"is of class {type(tensor).__name__}, not a tensor of shape {shape}"
    if tensor.shape != shape or tensor.dtype is not dtype:
        return f"has shape {tuple(tensor.shape)} and dtype {_name(tensor.dtype)}, not {shape} and {_name(dtype)}"
    return "" if has_memory(tensor) else f"of shape {shape} has no memory: its storage was freed or shortened"


def unsupported_memory(tensor: Tensor, dtypes: Container[torch.dtype]) -> str:
    """Return why a kernel cannot access a tensor by its address; empty if it can.

    Args:
        tensor: A parameter or a gradient.
        dtypes: Dtypes that the kernel supports.
    """
    if not is_plain(tensor):
        return type(tensor).__name__
    if tensor.dtype not in dtypes:
        return _name(tensor.dtype)
    if tensor.is_neg():
        return "negative bit"
    return "" if tensor.is_contiguous() else "not contiguous"


def increment_versions(params: Iterable[Tensor]) -> None:
    """Increment the versions of parameters that kernels have written; inference tensors have none."""
    torch.autograd.graph.increment_version([param for param in params if not param.is_inference()])


def check_shape(name: str, found: torch.Size, planned: tuple[int, ...]) -> None:
    """Refuse a parameter that was resized after its optimizer or accumulator was made.

    Raises:
        RuntimeError: Naming the parameter, both shapes and the remedy.
    """
    if found != planned:
        raise RuntimeError(
            f"{name} has shape {tuple(found)}, but had {planned} when its state was allocated: resize first "
            "(resize_token_embeddings, p.data = ...), then construct the optimizer and the accumulator"
        )


def check_parameter(name: str, param: Tensor) -> None:
    """Refuse a parameter that cannot be written to.

    Raises:
        RuntimeError: Its storage was freed, it is an inference tensor, or its elements share memory.
    """
    if not has_memory(param):
        raise RuntimeError(
            f"{name} of shape {tuple(param.shape)} has no memory: its storage was freed or shortened; "
            "restore it before the step"
        )
    if param.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} was made under torch.inference_mode(), outside of which it cannot be updated: "
            "make it under torch.no_grad(), or clone it"
        )
    if is_plain(param) and not param.is_contiguous() and torch._debug_has_internal_overlap(param) == 1:
        raise RuntimeError(f"{name} is expanded: several of its elements share memory; make it contiguous")


def validate_gradient(
    name: str, grad: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the gradient of a parameter with its values in memory.

    Args:
        name: Of the parameter.
        grad: Its ``.grad``.
        shape: Of the local part.
        dtype: Of the parameter; other floating-point dtypes are supported too, by the eager backend.
        device: Of the parameter.

    Raises:
        RuntimeError: It is not dense, or of another shape, device or kind of dtype than the parameter.
    """
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of {name} is sparse ({grad.layout}): Flora takes dense gradients; "
            "give sparse=False to its embedding"
        )
    grad = materialize(grad)
    fault = mismatch(grad, shape, grad.dtype if grad.is_floating_point() else dtype)
    if not fault and grad.device != device:
        fault = f"is on {grad.device}, not on {device}"
    if fault:
        raise RuntimeError(f"the gradient of {name} {fault}: zero_grad(), and run the backward pass again")
    return grad


def validate_state(name: str, state: dict[str, Any], layout: Layout) -> dict[str, Tensor]:
    """Return the state of a parameter with contiguous tensors.

    Args:
        name: Of the parameter.
        state: Tensors that are not contiguous are replaced in it.
        layout: Of the parameter.

    Raises:
        RuntimeError: Naming the entry that is missing, or has another shape or dtype.
    """
    if "step" not in state:
        raise RuntimeError(f"state['step'] of {name} is missing: {_STATE_REMEDY}")
    for key, (shape, dtype) in layout.state.items():
        value = state.get(key)
        fault = mismatch(value, shape, dtype) if key in state else f"of shape {shape} is missing"
        if fault:
            raise RuntimeError(f"state[{key!r}] of {name} {fault}: {_STATE_REMEDY}")
        assert isinstance(value, Tensor)
        if is_plain(value) and (not value.is_contiguous() or value.is_neg()):
            state[key] = materialize(value).contiguous()
    return state


def check_sketch(name: str, buffers: Mapping[str, Tensor], layout: Layout) -> None:
    """Refuse the buffers of an accumulator's sketch that are not as they were allocated.

    Raises:
        RuntimeError: Naming the parameter and the buffer.
    """
    for key, (shape, dtype) in layout.state.items():
        fault = mismatch(buffers.get(key), shape, dtype)
        if not fault and not buffers[key].is_contiguous():
            fault = "is not contiguous"
        if fault:
            raise RuntimeError(
                f"the sketch of {name}: {key!r} {fault}; leave its buffers as they are, and load_state_dict() a saved "
                "window, or construct a new accumulator"
            )


def gradient_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's ``.grad``: its own, or the one set by ``grad_dtype``."""
    chosen: torch.dtype | None = getattr(param, "grad_dtype", None)  # of torch from 2.10 on
    return chosen or param.dtype


def materialize(tensor: Tensor) -> Tensor:
    """Return the tensor with its values in memory: resolve its negative bit, allocate an efficient zero tensor."""
    if not is_plain(tensor):
        return tensor
    if not has_memory(tensor) and torch._is_zerotensor(tensor):
        return tensor.clone()
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _extent(tensor: Tensor) -> int:
    """Return the bytes from the first element to the end of the last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.itemsize


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
