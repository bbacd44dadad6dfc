"""What training on several devices adds to a step, or takes from it, on each of them."""

from torch import nn


def bucket_bytes(model: nn.Module) -> int:
    """Bytes of the buckets that DistributedDataParallel keeps: a copy of every gradient, in its dtype.

    They are flat buffers that gradients are copied into before they are averaged (``gradient_as_bucket_view=False``,
    the default of torch and of Hugging Face's Accelerate), and they stay from step to step.

    Args:
        model: Whose trainable parameters are averaged, tied ones once.

    Example:
        >>> bucket_bytes(nn.Linear(3, 5)) == 4 * (15 + 5)
        True
    """
    return sum(param.numel() * param.element_size() for param in model.parameters() if param.requires_grad)
