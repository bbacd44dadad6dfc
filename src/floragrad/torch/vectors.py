"""A step of many small tensors without a matrix view, biases and norms, an operation for all of them at a time."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator

import torch
from torch import Tensor

from floragrad.torch import update as pure
from floragrad.torch.handover import is_plain
from floragrad.torch.tensor_step import BLOCK_ELEMENTS, WHOLE_ELEMENTS, TensorUpdate


def steps_with_others(update: TensorUpdate) -> bool:
    """Whether a tensor is small, here, and of those that PyTorch's code would step one after the other."""
    is_small = update.at.plan.view is None and update.param.numel() <= WHOLE_ELEMENTS
    return is_small and is_plain(update.param) and is_plain(update.grad)


def _kind(update: TensorUpdate) -> Hashable:
    """What those that are stepped together have in common."""
    at = update.at
    return id(at.group), at.plan.momentum, at.step, at.device, update.param.dtype, update.grad.dtype


def step_vectors(vectors: Iterable[TensorUpdate]) -> None:
    """Update them and their states in place, to the numbers that ``step.step_tensors`` would give."""
    alike = defaultdict(list)
    for vector in vectors:
        alike[_kind(vector)].append(vector)
    for group in alike.values():
        for few in _batches(group):
            _step(few)


def _batches(vectors: list[TensorUpdate]) -> Iterator[list[TensorUpdate]]:
    """No more of them at a time than a block of a large tensor holds."""
    batch: list[TensorUpdate] = []
    total = 0
    for vector in vectors:
        total += vector.param.numel()
        if batch and total > BLOCK_ELEMENTS:
            yield batch
            batch, total = [], vector.param.numel()
        batch.append(vector)
    yield batch


def _step(vectors: list[TensorUpdate]) -> None:
    at, params = vectors[0].at, [vector.param for vector in vectors]
    eps, beta1, beta2 = at.group["eps"], at.group["beta1"], at.beta2
    numels = torch.tensor([param.numel() for param in params], dtype=torch.float32, device=at.device)
    grads = [vector.grad.float() for vector in vectors]
    variances = [vector.state["variance"] for vector in vectors]
    torch._foreach_clamp_max_(variances, pure.LARGEST_FLOAT)  # update.saturate_
    torch._foreach_mul_(variances, beta2)
    torch._foreach_add_(variances, torch._foreach_mul(grads, grads), alpha=1 - beta2)
    torch._foreach_add_(variances, (1 - beta2) * eps[0])
    directions = list(torch._foreach_rsqrt(variances))
    torch._foreach_mul_(directions, grads)
    if at.plan.momentum == "whole":
        averages = [vector.state["exp_avg"] for vector in vectors]
        torch._foreach_lerp_(averages, directions, 1 - beta1)
        directions = averages
    alphas: float | Tensor = at.step_lr
    if at.group["scale_parameter"]:
        norms = torch._foreach_norm(params, dtype=torch.promote_types(params[0].dtype, torch.float32))
        alphas = pure.relative(torch.stack(norms).float().square_(), numels, eps[1]) * alphas
    squares = torch.stack(torch._foreach_norm(directions)).square_()
    sizes = pure.clipped(alphas * at.sign, squares, numels, at.group["clip_threshold"])
    decay = at.group["weight_decay"]
    keeps = (
        (1 - torch.as_tensor(alphas, dtype=torch.float32, device=at.device) * decay).expand_as(sizes)
        if decay
        else [None] * len(params)
    )
    for vector, direction, size, keep in zip(vectors, directions, sizes, keeps, strict=True):
        pure.descend_(vector.param, direction, keep, size, _bits(vector))


def _bits(vector: TensorUpdate) -> Tensor | None:
    """What a bfloat16 parameter is rounded with."""
    rounding = vector.at.parameter_rounding(vector.param.dtype)
    return None if rounding is None else rounding.numbers().view(vector.param.shape)
