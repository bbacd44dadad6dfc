"""Which tensors the native kernels can take, and why not the others."""

from torch import Tensor

from floragrad.policy import TensorPlan
from floragrad.torch.handover import PLAIN, is_plain
from floragrad.torch.native.library import DTYPES, absence, library


def path_of(param: Tensor, plan: TensorPlan) -> str:
    """Which code steps a parameter, in words: ``"native (…)"`` or ``"eager (why)"``."""
    kernels = library()
    obstacle = absence() if kernels is None else unsuited(plan) or obstacle_of(param)
    return f"native ({kernels.name})" if kernels is not None and not obstacle else f"eager ({obstacle})"


def unsuited(plan: TensorPlan) -> str:
    """Why the kernels do not do what is asked for; empty where they do."""
    return "Gaussian projection" if plan.momentum == "sketch" and plan.projection == "gaussian" else ""


def obstacle_of(tensor: Tensor) -> str:
    """Why the kernels cannot take a tensor; empty where they can."""
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
