"""Requirements of the C++ kernels on tensors."""

from torch import Tensor

from floragrad.torch.backends.cpu.library import DTYPES
from floragrad.torch.validation import is_plain, unsupported_memory


def unsupported_tensor(tensor: Tensor) -> str:
    """Return why the kernels do not support a tensor; empty if they do."""
    return unsupported_memory(tensor, DTYPES) if tensor.is_cpu else f"on {tensor.device.type}"


def is_addressable(tensor: Tensor) -> bool:
    """Return whether a buffer is a plain contiguous CPU tensor, to be passed by its address."""
    return is_plain(tensor) and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()
