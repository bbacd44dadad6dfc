"""Which tensors the C++ kernels can take."""

from torch import Tensor

from floragrad.torch.backends.cpu.library import DTYPES
from floragrad.torch.handover import PLAIN, is_plain


def tensor_reason(tensor: Tensor) -> str:
    """Return why the kernels cannot take a tensor; empty where they can."""
    if lies_plainly(tensor) and tensor.dtype in DTYPES:
        return ""
    if not is_plain(tensor):
        return type(tensor).__name__
    if not tensor.is_cpu:
        return f"on {tensor.device.type}"
    if tensor.dtype not in DTYPES:
        return str(tensor.dtype).removeprefix("torch.")
    return "negative bit" if tensor.is_neg() else "not contiguous"


def lies_plainly(tensor: Tensor) -> bool:
    """Whether a buffer can be handed over by its address."""
    return type(tensor) in PLAIN and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()
