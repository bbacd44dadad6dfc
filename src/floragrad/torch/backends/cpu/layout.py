"""Which tensors the C++ kernels can take."""

from torch import Tensor

from floragrad.torch.backends.cpu.library import DTYPES
from floragrad.torch.validation import is_plain, unsupported_memory


def tensor_reason(tensor: Tensor) -> str:
    """Return why the kernels cannot take a tensor; empty where they can."""
    return unsupported_memory(tensor, DTYPES) if tensor.is_cpu else f"on {tensor.device.type}"


def lies_plainly(tensor: Tensor) -> bool:
    """Whether a buffer can be handed over by its address."""
    return is_plain(tensor) and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()
